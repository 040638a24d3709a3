"""Files at URIs, on the local filesystem; `fetch` also from a filesystem that is not local."""

from pathlib import Path

import pytest
from pyarrow import fs

from services import storage


@pytest.fixture(params=["path", "file://"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    root = tmp_path / "with space, 100% and #"
    return str(root) if request.param == "path" else root.as_uri()


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


def test_delete_removes_files_and_folders_and_repeats_harmlessly(folder: str) -> None:
    storage.write_bytes(storage.join(folder, "x", "y"), b"1")
    storage.write_bytes(storage.join(folder, "z"), b"1")
    for name in ("x", "z", "z", "never"):
        storage.delete(storage.join(folder, name))
    assert storage.list_uris(folder) == []


def test_join_keeps_a_filesystems_options_at_the_end() -> None:
    assert storage.join("s3://b/c/?region=x", "d e", "f") == "s3://b/c/d%20e/f?region=x"
    assert storage.join("/b/c/", "d e") == "/b/c/d e"


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    class Broken:
        def read(self, size: int) -> bytes:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        storage.write_stream(str(tmp_path / "f"), Broken())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


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
