"""Reads and writes files at URIs (`file://`, `s3://`, `gs://`) or local paths.

A file is written as a whole or not at all. Some folders, such as checkpoints, are only of use as a whole. Such a folder
has a file `manifest.json`, which `publish` writes last. Without this file, the folder is incomplete.
"""

import ctypes
import errno
import fcntl
import hashlib
import io
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, unquote, urlsplit

from pyarrow import fs

MANIFEST = "manifest.json"
MAX_UNSENT = 32 * 2**20  # most bytes of an object that wait in memory to be sent
LARGEST_COPY = 5 * 2**30  # bytes of the largest object that S3 copies by itself
DOWNLOADED_AT_ONCE = 8 * 2**20  # bytes of a request for a part of a file
NUM_DOWNLOADS = 8  # requests that are under way at the same time
BUCKETS = ("s3", "gs")
COPIES_VARIABLE = "RAYDPO_COPIES_BYTES"  # most bytes of copies that a node keeps; not set: as many as its disk holds
USED_SECONDS = 3600.0  # a copy that was asked for within this time may be in use, and stays
UNUSED_SECONDS = 86400.0  # a copy that nobody has asked for during this time goes
SPARE = 2**30  # bytes of the disk that copies leave free
FULL = (errno.ENOSPC, errno.EDQUOT)
AWAY = (
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ETIMEDOUT,
)
WORDS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")  # files of a model's tokenizer, templates and configs
BUCKET_FAILED = ("AWS Error ", "google::cloud::Status(")  # Arrow's errors of buckets contain one of these texts


class ShortReadError(OSError):
    """Raised if storage sends fewer bytes of a file than the file has."""


class ChangedFileError(OSError):
    """Raised if a file in storage changes while it is downloaded."""


class MissingBucketError(OSError):
    """Raised for a URI whose bucket does not exist."""


def is_full(error: BaseException) -> bool:
    """Whether the error says that the disk is full, or that the user has used up their quota on the disk."""
    return getattr(error, "errno", None) in FULL


def is_away(error: BaseException) -> bool:
    """Whether the error means that storage did not answer, or that a bucket refused the request.

    Arrow raises a plain OSError for errors of a bucket, as other libraries do for damaged files. Only the text tells
    them apart.
    """
    if isinstance(error, ShortReadError):
        return True
    if type(error) is OSError and error.errno is None:
        return any(text in str(error) for text in BUCKET_FAILED)
    return isinstance(error, OSError) and error.errno in AWAY


def check_bucket(uri: str) -> None:
    """Raises MissingBucketError, which names the bucket, if `uri` lies in a bucket that does not exist.

    Raises nothing if the storage does not answer, or does not tell this service whether the bucket exists.
    """
    if urlsplit(uri).scheme not in BUCKETS:
        return
    name = urlsplit(uri).netloc
    try:
        filesystem, _ = _resolve(uri)
        (info,) = filesystem.get_file_info([name])
        is_missing = info.type == fs.FileType.NotFound
    except OSError as error:  # Arrow asks AWS for the region of a bucket if the URI does not name the region
        is_missing = f"Bucket '{name}' not found" in str(error)
    if is_missing:
        raise MissingBucketError(f"The bucket '{name}' does not exist; create it, or name another one.")


def join(uri: str, *parts: str) -> str:
    """Returns `uri` followed by the file or folder names `parts`, with slashes in between. In a URI, the names are
    percent-encoded."""
    if "://" not in uri:
        return "/".join([uri.rstrip("/"), *parts])
    folder, mark, query = uri.partition("?")  # Arrow's filesystem options, such as endpoint_override
    return "/".join([folder.rstrip("/"), *map(quote, parts)]) + mark + query


def write_bytes(uri: str, data: bytes) -> None:
    write_stream(uri, io.BytesIO(data))


def write_file(uri: str, file: Path) -> None:
    """Copies a local file to `uri`."""
    with file.open("rb") as source:
        write_stream(uri, source)


def write_stream(uri: str, source: BinaryIO) -> None:
    """Copies `source`, from its current position to its end, to `uri`."""
    filesystem, path = _resolve(uri)
    if not isinstance(filesystem, fs.LocalFileSystem):
        _write_object(filesystem, path, source)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with beside.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())  # otherwise a power cut could leave an empty file under the name
        beside.rename(target)
    finally:
        beside.unlink(missing_ok=True)


def _write_object(filesystem: fs.FileSystem, path: str, source: BinaryIO) -> None:
    # By default, Arrow compresses files named .gz a second time.
    sink = filesystem.open_output_stream(path, compression=None)
    written, sending = 0, False
    try:
        while piece := source.read(1 << 20):
            sending = True
            sink.write(piece)
            if (written := written + len(piece)) >= MAX_UNSENT:
                sink.flush()  # otherwise a source that is faster than the network would fill the memory
                written = 0
            sending = False
        sending = True
        sink.close()  # now the object appears
    except BaseException as error:
        # Arrow cannot abandon an object: closing or freeing its stream completes the object, unless sending failed.
        # So the stream is never freed. The object keeps its previous content; the bucket's rules remove sent parts.
        if not (sending and isinstance(error, OSError)):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(sink))
        raise


def read_bytes(uri: str) -> bytes:
    """Returns the content of the file at `uri`. Raises FileNotFoundError if there is no file."""
    with open_input(uri) as source:
        return source.read()


def open_input(uri: str) -> io.BufferedReader:
    """Opens the file at `uri` as a seekable reader. Iterating over the reader yields lines."""
    filesystem, path = _resolve(uri)
    return io.BufferedReader(filesystem.open_input_file(path), 1 << 20)


def exists(uri: str) -> bool:
    return bool(_info(uri).type != fs.FileType.NotFound)


def list_uris(uri: str) -> list[str]:
    """Returns the sorted URIs of the files and folders directly in the folder `uri`, or [] if there is no folder."""
    return [join(uri, info.base_name) for info in _list(uri)]


def list_files(uri: str) -> list[str]:
    """Returns the sorted names of the files directly in the folder `uri`, or [] if there is no folder."""
    return [info.base_name for info in _list(uri) if info.type == fs.FileType.File]


def list_ages(uri: str) -> list[tuple[str, float]]:
    """Returns two values for each file directly in the folder `uri`: its name, and the seconds since it was written.

    In a local folder, unfinished files are included: those that are being written, and those whose writing was
    interrupted.
    """
    now = time.time()
    return [(info.base_name, now - info.mtime_ns / 1e9) for info in _infos(uri) if info.type == fs.FileType.File]


def list_folders(uri: str) -> list[str]:
    """Returns the sorted names of the folders directly in the folder `uri`, or [] if there is no folder."""
    return [info.base_name for info in _list(uri) if info.type == fs.FileType.Directory]


def list_tree(uri: str) -> list[tuple[str, int, int]]:
    """Returns every file in the folder `uri` and its subfolders, sorted by name, or [] if there is no folder. Hidden
    files, such as files that are being written, are left out.

    Each entry of the result has three values: the file's path below the folder, its size in bytes, and its modification
    time in nanoseconds.
    """
    filesystem, path = _resolve(uri)
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=True))
    names = ((str(Path(info.path).relative_to(path)), info) for info in infos if info.type == fs.FileType.File)
    return sorted((name, info.size, info.mtime_ns) for name, info in names if not Path(name).name.startswith("."))


def version(uri: str) -> tuple[int, int] | None:
    """Returns two values of the file at `uri`: its size in bytes, and its modification time in nanoseconds. Returns
    None if there is no file.

    If a later call returns another result, the file has changed.
    """
    info = _info(uri)
    return (info.size, info.mtime_ns) if info.type == fs.FileType.File else None


def delete(uri: str) -> None:
    """Removes the file or the folder, with all its content, at `uri`. Does nothing if `uri` does not exist."""
    filesystem, path = _resolve(uri)
    kind = _info(uri).type
    if kind == fs.FileType.Directory:
        filesystem.delete_dir(path)
    elif kind == fs.FileType.File:
        filesystem.delete_file(path)


def move(uri: str, target: str) -> None:
    """Moves a file to `target` in the same storage, and sets its modification time to now."""
    filesystem, path = _resolve(uri)
    _, goal = _resolve(target)
    if isinstance(filesystem, fs.LocalFileSystem):
        Path(goal).parent.mkdir(parents=True, exist_ok=True)
        os.utime(path)
        os.rename(path, goal)
    elif _info(uri).size > LARGEST_COPY:
        with open_input(uri) as source:
            write_stream(target, source)
        filesystem.delete_file(path)
    else:
        filesystem.move(path, goal)


def publish(folder: Path, uri: str) -> None:
    """Copies a local folder to `uri`, and its file `manifest.json` last. Overwrites existing files one by one."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    for file in sorted(files, key=lambda file: (file == Path(MANIFEST), file)):
        write_file(join(uri, *file.parts), folder / file)


def copy_folder(uri: str, target: str) -> None:
    """Copies all files of the folder at `uri` to the folder `target` in the same storage, one by one.

    A bucket copies its objects itself, so their content does not pass through this machine.
    """
    filesystem, path = _resolve(uri)
    _, goal = _resolve(target)
    for name, size, _ in list_tree(uri):
        if isinstance(filesystem, fs.LocalFileSystem) or size > LARGEST_COPY:
            with open_input(join(uri, *Path(name).parts)) as source:
                write_stream(join(target, *Path(name).parts), source)
        else:
            filesystem.copy_file(f"{path}/{name}", f"{goal}/{name}")


def fetch(uri: str, cache: Path | None = None, *, only: Sequence[str] = ()) -> Path:
    """Returns a local path with the content of the file or folder at `uri`.

    Remote content is downloaded once, to the folder `cache`. A local `uri` is returned as a path and not copied. The id
    of a model on the Hugging Face hub is returned unchanged. The content at a remote `uri` must not change after the
    first download, because the name of the copy in the cache depends only on the URI and the patterns in `only`.

    `only` has patterns of file names, such as `*.json`. If `uri` is a folder and there are patterns, only the files
    whose names match one of them are downloaded. Without patterns, all files are downloaded.

    If `cache` is None, the copy goes to a folder of this user on this node, which all of the user's processes share. A
    copy in this folder stays for at least an hour after it was last asked for. Later downloads remove copies to make
    room, and copies that nobody has asked for during a day.
    """
    if "://" not in uri:
        return Path(uri)
    filesystem, path = _resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        return Path(path)
    name = hashlib.sha256(" ".join([uri, *only]).encode()).hexdigest()[:16]
    if cache is not None:
        target = cache / name / Path(path).name
        if not target.exists():
            _download(filesystem, path, target, only)
        return target
    target = _copies() / name / Path(path).name
    with _alone(target.parent):
        with suppress(FileNotFoundError):
            os.utime(target.parent)
        if not target.exists():
            _download(filesystem, path, target, only, makes_room=True)
    return target


@contextmanager
def _alone(copy: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds the lock of the copy `copy` during the `with` block, so that no other process of this node downloads or
    removes this copy meanwhile.

    If another process holds the lock now, the function first waits for it. If `wait` is False, it raises
    BlockingIOError instead of waiting. The lock is free again at the end of the block, or when this process dies.
    `copy` may also be the path of an unfinished download, which shares the lock of the finished copy.
    """
    name = copy.name.lstrip(".").partition(".")[0]
    with copy.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a process that was forked meanwhile has inherited the open file


def _copies() -> Path:
    """Returns the folder of this node in which all processes of this user keep their copies of remote files. Makes the
    folder if there is none."""
    folder = Path(tempfile.gettempdir()) / f"raydpo-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(
            f"The folder {folder} belongs to user {folder.stat().st_uid}; set TMPDIR to a folder of your own."
        )
    return folder


def make_room(folder: Path, needed: int) -> None:
    """Removes copies of remote files from the folder, to make room for another copy of `needed` bytes. There is room if
    all copies together have at most as many bytes as the environment variable RAYDPO_COPIES_BYTES says (not set: no
    limit), and the disk keeps SPARE bytes free.

    First removes all copies that nobody has asked for within UNUSED_SECONDS. If there is still too little room, removes
    more copies, the oldest first, but none that somebody has asked for within USED_SECONDS. Unfinished downloads of
    killed processes are removed by the same rules. Downloads that are under way stay.
    """
    limit = int(os.environ.get(COPIES_VARIABLE, 2**63))
    copies: list[tuple[float, int, Path]] = []
    for copy in folder.iterdir():
        with suppress(OSError):  # another process removes this copy
            if copy.is_dir():
                size = sum(file.stat().st_size for file in copy.rglob("*") if file.is_file())
                copies.append((copy.stat().st_mtime, size, copy))
    held = sum(size for _, size, _ in copies) + needed
    for last_use, size, copy in sorted(copies):
        lacks = held > limit or shutil.disk_usage(folder).free < needed + SPARE
        if time.time() - last_use > (USED_SECONDS if lacks else UNUSED_SECONDS) and _remove(copy, last_use):
            held -= size


def _remove(copy: Path, last_use: float) -> bool:
    """Removes a copy, unless a process downloads it at the moment, or has asked for it after `last_use`, a time in
    seconds since 1970. Returns whether the copy was removed."""
    try:
        with _alone(copy, wait=False):
            if copy.stat().st_mtime != last_use:
                return False
            # Otherwise a process that is killed here would leave a part of a model under the model's name.
            beside = copy.rename(_beside(copy))
    except OSError:  # another process downloads or removes the copy
        return False
    shutil.rmtree(beside, ignore_errors=True)
    return True


def _beside(copy: Path) -> Path:
    """Returns a new path next to a copy, for an unfinished download of this copy. The path begins with the copy's own
    name, by which `_alone` finds the copy's lock.
    """
    return copy.with_name(f".{copy.name.lstrip('.').partition('.')[0]}.{secrets.token_hex(4)}")


def _download(
    filesystem: fs.FileSystem, path: str, target: Path, only: Sequence[str], *, makes_room: bool = False
) -> None:
    """Downloads the file or folder at `path` of `filesystem` to the local path `target`.

    The files lie in a hidden folder at first. When all files are complete, this folder gets the name of the parent
    folder of `target`. `only` has patterns of file names, as in `fetch`. If `makes_room` is True and the disk has no
    room, local copies of other files are removed; the caller must then hold the lock of the copy that is being made.
    """
    (info,) = filesystem.get_file_info([path])
    is_folder, wanted = info.type == fs.FileType.Directory, [info]
    if is_folder:
        listed = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
        files = [file for file in listed if file.type != fs.FileType.Directory]
        wanted = [file for file in files if not only or any(fnmatch(file.base_name, pattern) for pattern in only)]
    if makes_room:
        for left in target.parents[1].glob(f".{target.parent.name}.*"):  # by a killed process, which had the lock
            shutil.rmtree(left, ignore_errors=True)
        make_room(target.parents[1], sum(file.size or 0 for file in wanted))
    beside = _beside(target.parent)
    paths = [beside / target.name / Path(file.path).relative_to(path) for file in wanted]
    try:
        (beside / target.name if is_folder else beside).mkdir(parents=True)
        for local in paths:  # now and not later, because a folder that somebody removes must not come again, half empty
            local.parent.mkdir(parents=True, exist_ok=True)
        sizes = [_download_file(filesystem, file.path, local) for file, local in zip(wanted, paths, strict=True)]
        for local, size in zip(paths, sizes, strict=True):
            if local.stat().st_size != size:
                raise ShortReadError(f"The copy {local} has {local.stat().st_size} of {size} bytes.")
        os.utime(beside)
        beside.rename(target.parent)
    except OSError:
        if not target.exists():  # if it exists, another process downloaded it first
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _download_file(filesystem: fs.FileSystem, path: str, local: Path) -> int:
    """Downloads the file at `path` of `filesystem` to the local path `local`, and returns its size in bytes. Several
    requests run at the same time, each for a part of the file.

    Raises ShortReadError if the storage sends fewer bytes than the file has, and ChangedFileError if the file changes
    meanwhile: its parts would be of different contents.
    """
    (before,) = filesystem.get_file_info([path])
    size = before.size or 0
    with (
        filesystem.open_input_file(path) as source,
        local.open("wb") as sink,
        ThreadPoolExecutor(NUM_DOWNLOADS) as threads,
    ):

        def copy(start: int) -> None:
            length = min(DOWNLOADED_AT_ONCE, size - start)
            data = source.read_at(length, start)
            if len(data) != length:
                raise ShortReadError(
                    f"The storage sent only {len(data)} of the {length} bytes of {path} from byte {start} on."
                )
            os.pwrite(sink.fileno(), data, start)

        for _ in threads.map(copy, range(0, size, DOWNLOADED_AT_ONCE)):  # if one fails, those that wait are not made
            continue
    (after,) = filesystem.get_file_info([path])
    if (after.size, after.mtime_ns) != (before.size, before.mtime_ns):
        raise ChangedFileError(f"The file {path} changed while it was downloaded; store new content under a new name.")
    return size


def _resolve(uri: str) -> tuple[fs.FileSystem, str]:
    split = urlsplit(uri)
    if split.scheme in BUCKETS:
        path = unquote(split.netloc + split.path).rstrip("/")
        return _bucket(split.scheme, split.netloc, split.query, os.getpid()), path
    filesystem, path = fs.FileSystem.from_uri(uri if "://" in uri else os.path.abspath(uri))
    return filesystem, path


@lru_cache(maxsize=64)
def _bucket(scheme: str, name: str, options: str, process: int) -> fs.FileSystem:
    """Returns the filesystem of the bucket `name`, and caches it, because making it takes requests and threads.

    `scheme` is the URI's scheme, such as s3, and `options` the query of the URI. `process` is the id of this process.
    It is a part of the cache's key, because a fork does not inherit the threads and must make a filesystem of its own.
    """
    filesystem, _ = fs.FileSystem.from_uri(f"{scheme}://{name}/?{options}")
    return filesystem


def _infos(uri: str) -> list[fs.FileInfo]:
    filesystem, path = _resolve(uri)
    selector = fs.FileSelector(path, allow_not_found=True)
    try:
        infos: list[fs.FileInfo] = filesystem.get_file_info(selector)
    except FileNotFoundError:  # Arrow raises this if the folder appears during the listing
        infos = filesystem.get_file_info(selector)
    return infos


def _list(uri: str) -> list[fs.FileInfo]:
    shown = (info for info in _infos(uri) if not info.base_name.startswith("."))
    return sorted(shown, key=lambda info: info.base_name)


def _info(uri: str) -> fs.FileInfo:
    filesystem, path = _resolve(uri)
    (info,) = filesystem.get_file_info([path])
    return info
