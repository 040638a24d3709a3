"""Tests reading and writing of files at URIs, on the local filesystem and on S3."""

import errno
import gc
import io
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import fs

from services import storage
from tests.services.s3 import S3


@pytest.fixture(params=["path", "file://", "s3://"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    name = "with space, 100% and #"
    if request.param == "s3://":
        return storage.join(request.getfixturevalue("s3").new_folder(), name)
    return str(tmp_path / name) if request.param == "path" else (tmp_path / name).as_uri()


def test_what_is_written_is_read_again(folder: str) -> None:
    uri = storage.join(folder, "a b", "c#?%20.json")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"one\ntwo\n")
    assert storage.read_bytes(uri) == b"one\ntwo\n"
    assert list(storage.open_input(uri)) == [b"one\n", b"two\n"]
    assert storage.exists(uri)
    assert storage.exists(folder)
    assert storage.list_uris(storage.join(folder, "a b")) == [uri]


def test_reading_nothing_says_so(folder: str) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(folder, "missing"))
    assert storage.list_uris(folder) == []


def test_a_tree_lists_the_files_of_all_folders_with_their_sizes(folder: str) -> None:
    for names in (("b",), ("a b", "c", "d"), (".hidden",)):
        storage.write_bytes(storage.join(folder, *names), b"12")
    listed = storage.list_tree(folder)
    assert [(name, size) for name, size, _ in listed] == [("a b/c/d", 2), ("b", 2)]
    assert all(mtime > 0 for *_, mtime in listed)
    assert storage.list_tree(storage.join(folder, "none")) == []


def test_delete_removes_files_and_folders_and_repeats_harmlessly(folder: str) -> None:
    storage.write_bytes(storage.join(folder, "x", "y"), b"1")
    storage.write_bytes(storage.join(folder, "z"), b"1")
    for name in ("x", "z", "z", "never"):
        storage.delete(storage.join(folder, name))
    assert storage.list_uris(folder) == []


def test_a_bucket_that_does_not_exist_is_refused_by_its_name(s3: S3, tmp_path: Path) -> None:
    with pytest.raises(storage.MissingBucketError, match="The bucket 'nobodys' does not exist"):
        storage.check_bucket(f"s3://nobodys/raydpo/{s3.options}")
    there = s3.new_folder()
    storage.check_bucket(there)  # an empty one, without the folder
    storage.check_bucket(tmp_path.as_uri())
    s3.proxy.refusing = True
    try:
        storage.check_bucket(there)  # nobody can tell
    finally:
        s3.proxy.pass_on()


def test_join_keeps_a_filesystems_options_at_the_end() -> None:
    assert storage.join("s3://b/c/?region=x", "d e", "f") == "s3://b/c/d%20e/f?region=x"
    assert storage.join("/b/c/", "d e") == "/b/c/d e"


class Broken(io.RawIOBase):
    """A file whose reading fails after some MiB."""

    def __init__(self, megabytes: int) -> None:
        self._left = megabytes

    def read(self, size: int = -1) -> bytes:
        if not self._left:
            raise OSError("the source is gone")
        self._left -= 1
        return b"x" * 2**20


@pytest.mark.parametrize("megabytes", [0, 3, 12])  # S3 takes pieces of 5 and 10 MiB
def test_a_write_that_breaks_off_leaves_what_was_there(folder: str, megabytes: int) -> None:
    new, old = storage.join(folder, "new"), storage.join(folder, "old")
    storage.write_bytes(old, b"whole")
    for uri in (new, old):
        with pytest.raises(OSError, match="gone"):
            storage.write_stream(uri, Broken(megabytes))
    gc.collect()  # what is freed must not complete what was written
    assert storage.list_ages(folder) == [("old", pytest.approx(0, abs=600))]
    assert storage.read_bytes(old) == b"whole"


def test_a_process_that_breaks_off_a_write_ends_and_leaves_nothing(s3: S3) -> None:
    """Arrow would wait for ever for an S3 stream that is freed while the process ends."""
    uri = storage.join(s3.new_folder(), "f")
    run = subprocess.run([sys.executable, "-c", BREAKS_OFF, uri], capture_output=True, text=True, timeout=300)
    assert "the source is gone" in run.stderr
    assert not storage.exists(uri)


BREAKS_OFF = """
import sys
from services import storage
class Broken:
    def read(self, size):
        if not pieces:
            raise OSError("the source is gone")
        return pieces.pop()
pieces = [bytes(2**20)] * 12
storage.write_stream(sys.argv[1], Broken())
"""


@pytest.mark.slow
def test_a_storage_that_goes_away_while_it_is_written_keeps_what_was_there(s3: S3) -> None:
    uri = storage.join(s3.new_folder(), "f")
    storage.write_bytes(uri, b"whole")

    class Source(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 11 * 2**20:  # a piece is sent, more follow
                s3.proxy.refusing = True
                s3.proxy.cut()
            return super().read(size)

    before = pa.default_memory_pool().bytes_allocated()
    with pytest.raises(OSError, match="AWS Error"):
        storage.write_stream(uri, Source(bytes(24 * 2**20)))
    s3.proxy.pass_on()
    gc.collect()
    assert pa.default_memory_pool().bytes_allocated() == before
    assert storage.read_bytes(uri) == b"whole"


def test_a_slow_storage_is_waited_for(s3: S3) -> None:
    uri = storage.join(s3.new_folder(), "f")
    s3.proxy.delay_seconds = 0.05
    storage.write_bytes(uri, b"whole")
    assert storage.read_bytes(uri) == b"whole"


def test_what_a_slow_storage_has_not_taken_yet_is_not_held_in_memory(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_UNSENT", 5 * 2**20)
    s3.proxy.delay_seconds = 0.003
    held = []

    class Source(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            held.append(pa.default_memory_pool().bytes_allocated())
            return super().read(size)

    storage.write_stream(storage.join(s3.new_folder(), "f"), Source(bytes(50 * 2**20)))
    assert max(held) - held[0] < 30 * 2**20


@pytest.mark.parametrize("largest_copy", [storage.LARGEST_COPY, 3])
def test_a_moved_file_is_as_new(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest_copy: int
) -> None:
    monkeypatch.setattr(storage, "LARGEST_COPY", largest_copy)
    old, new = storage.join(folder, "a b"), storage.join(folder, "c", "d")
    storage.write_bytes(old, b"whole")
    if "s3://" not in folder:
        os.utime(storage.fetch(old), (1, 1))
    storage.move(old, new)
    assert storage.list_files(folder) == []
    assert storage.read_bytes(new) == b"whole"
    ((name, seconds),) = storage.list_ages(storage.join(folder, "c"))
    assert (name, seconds) == ("d", pytest.approx(0, abs=600))


def test_publish_writes_the_manifest_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    for name in ("manifest.json", "state.json", "model/weights", "model/manifest.json"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    written: list[str] = []
    write_file = storage.write_file
    monkeypatch.setattr(storage, "write_file", lambda uri, file: (written.append(uri), write_file(uri, file)))
    target = (tmp_path / "target").as_uri()
    storage.publish(source, target)
    storage.publish(source, target)  # again is harmless
    assert written[3] == written[7] == storage.join(target, "manifest.json")
    assert storage.read_bytes(storage.join(target, "model", "weights")) == b"model/weights"


def test_fetch_gives_local_paths_as_they_are(tmp_path: Path) -> None:
    assert storage.fetch(tmp_path.as_uri()) == tmp_path
    assert storage.fetch(str(tmp_path)) == tmp_path
    assert storage.fetch("org/model") == Path("org/model")


def test_fetch_downloads_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distant = fs.SubTreeFileSystem(str(tmp_path / "distant"), fs.LocalFileSystem())
    for name in ("ckpt/manifest.json", "ckpt/model/weights"):
        (tmp_path / "distant" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "distant" / name).write_text(name)
    monkeypatch.setattr(storage, "_resolve", lambda uri: (distant, uri.removeprefix("far://")))
    fetched = storage.fetch("far://ckpt", cache=tmp_path / "cache")
    assert fetched.name == "ckpt"
    assert (fetched / "model/weights").read_text() == "ckpt/model/weights"
    (tmp_path / "distant/ckpt/manifest.json").write_text("changed")
    assert storage.fetch("far://ckpt", cache=tmp_path / "cache") == fetched
    assert (fetched / "manifest.json").read_text() == "ckpt/manifest.json"
    assert storage.fetch("far://ckpt/model/weights", cache=tmp_path / "cache").read_text() == "ckpt/model/weights"
    with pytest.raises(FileNotFoundError):
        storage.fetch("far://missing", cache=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


def test_only_the_files_that_are_wanted_are_fetched(s3: S3, tmp_path: Path) -> None:
    folder = storage.join(s3.new_folder(), "model")
    for names in (("config.json",), ("deep", "words.txt"), ("model.safetensors",)):
        storage.write_bytes(storage.join(folder, *names), b"1")
    words = storage.fetch(folder, tmp_path, only=["*.json", "*.txt"])
    assert sorted(path.name for path in words.rglob("*") if path.is_file()) == ["config.json", "words.txt"]
    assert (storage.fetch(folder, tmp_path) / "model.safetensors").is_file()
    assert not (storage.fetch(folder, tmp_path, only=["*.json", "*.txt"]) / "model.safetensors").exists()
    assert not any(storage.fetch(folder, tmp_path, only=["*.none"]).iterdir())


def test_a_file_is_fetched_in_parts(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "DOWNLOADED_AT_ONCE", 1000)
    data = os.urandom(12_345)
    uri = storage.join(s3.new_folder(), "f")
    storage.write_bytes(uri, data)
    assert storage.fetch(uri, tmp_path).read_bytes() == data


@pytest.mark.slow
def test_an_answer_that_breaks_off_is_no_file(s3: S3, tmp_path: Path) -> None:
    uri = storage.join(s3.new_folder(), "f")
    data = os.urandom(2**20)
    storage.write_bytes(uri, data)
    s3.proxy.cut()  # the connections that are open are not truncated
    s3.proxy.truncate_after = 2**19
    with pytest.raises(OSError, match=r"AWS Error|was sent with"):
        storage.fetch(uri, tmp_path)
    assert not list(tmp_path.iterdir())
    s3.proxy.pass_on()
    assert storage.fetch(uri, tmp_path).read_bytes() == data


@pytest.mark.slow
def test_a_storage_that_fails_now_and_then_is_asked_again(s3: S3, tmp_path: Path) -> None:
    folder = s3.new_folder()
    s3.proxy.fail_every = 10
    for number in range(30):
        s3.proxy.cut()
        storage.write_bytes(storage.join(folder, str(number)), bytes(number))
    s3.proxy.cut()
    fetched = storage.fetch(folder, tmp_path)
    assert [len((fetched / str(number)).read_bytes()) for number in range(30)] == list(range(30))


@pytest.mark.parametrize("largest_copy", [storage.LARGEST_COPY, 3])
def test_a_copied_folder_is_the_same(folder: str, monkeypatch: pytest.MonkeyPatch, largest_copy: int) -> None:
    monkeypatch.setattr(storage, "LARGEST_COPY", largest_copy)
    source, target = storage.join(folder, "a b"), storage.join(folder, "c")
    for names in (("d#",), ("e", "f%20")):
        storage.write_bytes(storage.join(source, *names), names[-1].encode() * 2)
    for _ in range(2):  # again is harmless
        storage.copy_folder(source, target)
    assert [name for name, *_ in storage.list_tree(target)] == ["d#", "e/f%20"]
    assert storage.read_bytes(storage.join(target, "e", "f%20")) == b"f%20f%20"
    assert len(storage.list_tree(source)) == 2


def test_a_bucket_is_the_same_as_arrows(s3: S3) -> None:
    for names in (("a b", "c#?%20.json"), ("ä+x",), ()):
        uri = storage.join(s3.new_folder(), *names)
        assert storage._resolve(uri) == fs.FileSystem.from_uri(uri)


HOURS = 3600.0


def ages_of_copies(folder: Path, *hours: float) -> list[Path]:
    """Makes copies of 1000 bytes that were asked for so many hours ago."""
    copies = [folder / str(number) for number in range(len(hours))]
    for copy, age in zip(copies, hours, strict=True):
        (copy / "model").mkdir(parents=True)
        (copy / "model" / "weights").write_bytes(bytes(1000))
        os.utime(copy, (time.time() - age * HOURS,) * 2)
    return copies


def test_copies_that_nobody_asks_for_go_when_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used, older, oldest = ages_of_copies(tmp_path, 0.5, 2, 3)
    storage.make_room(tmp_path, 1000)
    assert oldest.exists(), "the disk has room"
    monkeypatch.setenv(storage.COPIES_VARIABLE, "3000")
    storage.make_room(tmp_path, 1000)
    assert [copy.exists() for copy in (used, older, oldest)] == [True, True, False]
    storage.make_room(tmp_path, 5000)
    assert [copy.exists() for copy in (used, older)] == [True, False]


def test_copies_go_when_the_disk_has_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used, older = ages_of_copies(tmp_path, 0.5, 2)
    storage.make_room(tmp_path, 2**62)
    assert [copy.exists() for copy in (used, older)] == [True, False]


def test_old_copies_and_unfinished_downloads_go_in_any_case(tmp_path: Path) -> None:
    old, young = ages_of_copies(tmp_path, 25, 23)
    (unfinished := tmp_path / ".0.abcd").mkdir()
    os.utime(unfinished, (0, 0))
    storage.make_room(tmp_path, 0)
    assert [copy.exists() for copy in (old, young, unfinished)] == [False, True, False]


@pytest.mark.slow
def test_of_several_processes_that_need_a_model_one_downloads_it(s3: S3, tmp_path: Path) -> None:
    uri = storage.join(s3.new_folder(), "model")
    storage.write_bytes(storage.join(uri, "weights"), bytes(2**24))
    s3.proxy.passed = 0
    s3.proxy.delay_seconds = 0.001
    fetches = "import sys; from services import storage; print(storage.fetch(sys.argv[1]))"
    command = [sys.executable, "-c", fetches, uri]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    ranks = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    (folder,) = {rank.communicate()[0].strip() for rank in ranks}
    assert (Path(folder) / "weights").stat().st_size == 2**24
    assert 2**24 < s3.proxy.passed < 1.5 * 2**24


def test_a_copy_that_goes_is_never_there_by_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (old,) = ages_of_copies(tmp_path, 25)
    monkeypatch.setattr(shutil, "rmtree", lambda folder, **_: None)  # as if the process were killed
    storage.make_room(tmp_path, 0)
    assert not old.exists()
    monkeypatch.undo()
    (left,) = (path for path in tmp_path.iterdir() if path.is_dir())
    os.utime(left, (0, 0))
    storage.make_room(tmp_path, 0)
    assert not left.exists()


class Watched:
    """A filesystem that calls a function before it reads a part of a file, with the byte where the part begins."""

    def __init__(self, filesystem: fs.FileSystem, before_read: Callable[[int], object]) -> None:
        self._filesystem, self._before_read = filesystem, before_read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._filesystem, name)

    @contextmanager
    def open_input_file(self, path: str) -> Iterator[Any]:
        with self._filesystem.open_input_file(path) as source:

            def read_at(length: int, start: int) -> bytes:
                self._before_read(start)
                return bytes(source.read_at(length, start))

            yield SimpleNamespace(read_at=read_at)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], object]], None]:
    """Returns a function. Its argument is called from then on before a download reads a part of a file."""
    resolve = storage._resolve

    def start(before_read: Callable[[int], object]) -> None:
        def watched(uri: str) -> tuple[Any, str]:
            filesystem, path = resolve(uri)
            return Watched(filesystem, before_read), path

        monkeypatch.setattr(storage, "_resolve", watched)

    return start


def test_a_download_that_fails_asks_no_further(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: Any
) -> None:
    uri = storage.join(s3.new_folder(), "f")
    storage.write_bytes(uri, bytes(1000))
    reads, ends = [], threading.Event()

    class Threads(ThreadPoolExecutor):
        def shutdown(self, *args: Any, **options: Any) -> None:
            ends.set()
            super().shutdown(*args, **options)

    def fail(start: int) -> None:
        reads.append(start)
        if start:
            assert ends.wait(300)
        raise OSError("the storage is gone")

    watch(fail)
    monkeypatch.setattr(storage, "DOWNLOADED_AT_ONCE", 1)
    monkeypatch.setattr(storage, "ThreadPoolExecutor", Threads)
    with pytest.raises(OSError, match="gone"):
        storage.fetch(uri, tmp_path)
    assert len(reads) <= storage.NUM_DOWNLOADS + 1  # the thread that failed has taken another part


def test_a_file_that_changes_while_it_is_downloaded_is_refused(s3: S3, tmp_path: Path, watch: Any) -> None:
    uri = storage.join(s3.new_folder(), "model")
    storage.write_bytes(storage.join(uri, "weights"), b"old")
    watch(lambda start: storage.write_bytes(storage.join(uri, "weights"), b"newer"))
    with pytest.raises(storage.ChangedFileError, match=r"model/weights changed while it was downloaded; store new"):
        storage.fetch(uri, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the folder in which this test's copies are kept."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return storage._copies()


def test_a_download_that_takes_long_is_not_removed_and_is_new_when_it_ends(s3: S3, copies: Path, watch: Any) -> None:
    uri = storage.join(s3.new_folder(), "model")
    for name in ("one", "two"):
        storage.write_bytes(storage.join(uri, name), b"1")

    def take_long(start: int) -> None:
        (unfinished,) = copies.glob(".*.*")
        os.utime(unfinished, (0, 0))
        storage.make_room(copies, 2**62)

    watch(take_long)
    copy = storage.fetch(uri)
    assert sorted(path.name for path in copy.iterdir()) == ["one", "two"]
    storage.make_room(copies, 2**62)
    assert copy.exists()


def test_a_copy_that_somebody_removes_while_it_is_downloaded_does_not_appear_by_half(
    s3: S3, copies: Path, watch: Any
) -> None:
    uri = storage.join(s3.new_folder(), "model")
    for name in ("one", "two"):
        storage.write_bytes(storage.join(uri, name), b"1")

    def remove(start: int) -> None:
        (unfinished,) = copies.glob(".*.*")
        shutil.rmtree(unfinished)

    watch(remove)
    with pytest.raises(FileNotFoundError):
        storage.fetch(uri)
    assert not [path for path in copies.iterdir() if path.is_dir()]
    watch(lambda start: None)
    assert len(list(storage.fetch(uri).iterdir())) == 2


def test_what_a_killed_process_left_goes_when_the_same_copy_is_downloaded(s3: S3, copies: Path, watch: Any) -> None:
    uri = storage.join(s3.new_folder(), "model")
    storage.write_bytes(storage.join(uri, "weights"), b"1")

    class Killed(BaseException):
        pass

    def die(start: int) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda folder, **_: None)
        watch(die)
        with pytest.raises(Killed):
            storage.fetch(uri)
    (left,) = copies.glob(".*.*")
    watch(lambda start: None)
    storage.fetch(uri)
    assert not left.exists()


def test_a_copy_that_is_asked_for_before_it_goes_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for, old = ages_of_copies(tmp_path, 26, 25)
    usage = shutil.disk_usage

    def ask(folder: Path) -> Any:
        os.utime(asked_for)
        return usage(folder)

    monkeypatch.setattr(shutil, "disk_usage", ask)
    storage.make_room(tmp_path, 0)
    assert [copy.exists() for copy in (asked_for, old)] == [True, False]


def test_a_copy_that_vanishes_does_not_end_the_cleaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = ages_of_copies(tmp_path, 27, 26, 25)
    is_file = Path.is_file
    vanished: list[Path] = []

    def vanishes(path: Path) -> bool:
        found = is_file(path)
        if found and not vanished:
            vanished.append(path)
            path.unlink()
        return found

    monkeypatch.setattr(Path, "is_file", vanishes)
    storage.make_room(tmp_path, 0)
    assert [copy.exists() for copy in copies] == [copy in vanished[0].parents for copy in copies]


def test_a_copy_that_is_asked_for_is_in_use_from_then_on(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    one, two = (storage.join(s3.new_folder(), "model") for _ in range(2))
    for uri in (one, two):
        storage.write_bytes(storage.join(uri, "weights"), b"1")
    copy = storage.fetch(one)
    os.utime(copy.parent, (0, 0))
    assert storage.fetch(one) == copy
    storage.fetch(two)
    assert copy.exists()
    os.utime(copy.parent, (0, 0))
    storage.fetch(two)
    assert copy.exists(), "only a download makes room"
    storage.fetch(storage.join(two, "weights"))
    assert not copy.exists()


def test_a_packed_file_is_stored_and_fetched_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distant = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(storage, "_resolve", lambda uri: (distant, uri.removeprefix("far://")))
    storage.write_bytes("far://rows.gz", b"\x1f\x8b and more")
    assert storage.read_bytes("far://rows.gz") == b"\x1f\x8b and more"
    assert storage.fetch("far://rows.gz", cache=tmp_path / "cache").read_bytes() == b"\x1f\x8b and more"


def test_only_files_are_listed_as_files_and_have_a_version(folder: str) -> None:
    storage.write_bytes(storage.join(folder, "b", "c"), b"1")
    storage.write_bytes(storage.join(folder, "a 1"), b"1")
    assert storage.list_files(folder) == ["a 1"]
    assert storage.list_folders(folder) == ["b"]
    assert storage.list_folders(storage.join(folder, "none")) == []
    assert storage.version(storage.join(folder, "b")) is None
    assert storage.version(storage.join(folder, "none")) is None
    first = storage.version(storage.join(folder, "a 1"))
    storage.write_bytes(storage.join(folder, "a 1"), b"12")
    assert storage.version(storage.join(folder, "a 1")) != first


@pytest.mark.parametrize(
    ("error", "away"),
    [
        (
            OSError("When reading key 'a' in bucket 'b': AWS Error NETWORK_CONNECTION during HeadObject"),
            True,
        ),
        (OSError("google::cloud::Status(UNAVAILABLE: Permanent error in GetObjectMetadata: Couldn't connect)"), True),
        (storage.ShortReadError("The storage sent only 1 of the 2 bytes of bucket/f from byte 0 on."), True),
        (OSError(errno.ETIMEDOUT, "Connection timed out"), True),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), True),
        (OSError("Can't load tokenizer for 'model'. Make sure that it is the correct path."), False),
        (storage.ChangedFileError("The file bucket/f changed while it was downloaded."), False),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), False),
        (TimeoutError("a task took too long"), False),
        (ValueError("AWS Error "), False),
    ],
)
def test_only_errors_of_storage_say_that_it_is_away(error: Exception, away: bool) -> None:
    assert storage.is_away(error) is away
