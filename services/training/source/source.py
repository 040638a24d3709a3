"""Provides a job's training file as one uncompressed file of JSON Lines.

The training file may be an upload, or one or several files at a user's URI, in any supported file format.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import NamedTuple
from urllib.parse import unquote, urlsplit, urlunsplit

import httpx
import pyarrow as pa

from dpo_core.data.jsonl import InvalidRow, read_lines
from services import outbound, storage
from services.containers import Reader, is_plain, json_lines
from services.contract import MIN_EXAMPLES, AttemptSpec, Failed, Message, Report
from services.training.reports.reporting import JobFailed, invalid_file, progress
from services.training.source import hub
from services.training.source.download import PAUSES_SECONDS, Remote, download
from services.uri import PORTS, InvalidUri, admitted, is_folder, matches

FILES_NAMED = 10
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class _File(NamedTuple):
    name: str  # shown to the user
    uri: str  # a URI that `services.storage` can read


@contextmanager
def as_plain_file(spec: AttemptSpec, folder_uri: str, report: Callable[[Report], None]) -> Iterator[AttemptSpec]:
    """Yields a copy of the spec (the settings of one run of a job) whose `training_uri` names one uncompressed file of
    JSON Lines.

    If the training file has this form already, `training_uri` names the training file itself. Otherwise it names a copy
    in the folder `folder_uri`; the copy is deleted when the `with` block ends normally. Raises JobFailed for errors
    that the user can fix, and OSError if the training file changes during the block.
    """
    try:
        files = [_File("training_file", spec.training_uri)]
        if spec.dataset_uris is not None:
            files = _fetch(spec.training_uri, spec.dataset_uris, storage.join(folder_uri, "downloads"), report)
        uri = _as_one(files, storage.join(folder_uri, "training.jsonl"), report)
    except InvalidUri as error:
        raise _failed(spec, str(error)) from error
    if spec.dataset_uris is not None:
        _check_count(spec, uri)
    version = storage.version(uri)
    yield spec.model_copy(update={"training_uri": uri})
    if storage.version(uri) != version:
        raise OSError(f"The file {uri} changed while it was being read.")
    storage.delete(folder_uri)


def unpacked(uri: str, to_uri: str) -> str:
    """Returns the URI of a file that has the content of an uploaded file as uncompressed JSON Lines.

    If the uploaded file is compressed or a table, its lines are written to `to_uri`, and `to_uri` is returned. If it is
    uncompressed JSON Lines already, `uri` is returned. Raises JobFailed for a damaged file.
    """
    try:
        return _as_one([_File("training_file", uri)], to_uri, lambda report: None)
    except InvalidUri as error:
        raise JobFailed(invalid_file(str(error))) from error


def _failed(spec: AttemptSpec, message: str, code: str = "invalid_training_file") -> JobFailed:
    param = "training_file" if spec.dataset_uris is None else "x_raydpo.dataset"
    return JobFailed(Failed(code=code, message=message, param=param))


def _fetch(uri: str, prefixes: Sequence[str], folder_uri: str, report: Callable[[Report], None]) -> list[_File]:
    """Returns the files of a dataset that `uri` names, at least one. Raises InvalidUri if `prefixes`, the setting
    `dataset_uris`, does not allow the URI, or if a file cannot be read.

    Files at http, https and hf URIs are downloaded to `folder_uri`.
    """
    place = admitted(uri, prefixes)
    scheme = urlsplit(uri).scheme
    if scheme in PORTS:
        with outbound.client(prefixes) as client:
            return _download(client, [Remote(uri, 0, uri)], folder_uri, report)
    if scheme == "hf":
        with hub.client(uri, prefixes) as client:
            return _download(client, hub.find(uri, prefixes, report), folder_uri, report)
    try:
        files = _in_folder(uri, prefixes) if is_folder(uri) else [_File(uri, place)]
        for file in files:
            if storage.version(file.uri) is None:
                raise InvalidUri(
                    f"{uri} is not a file that the service can read; "
                    "correct the URI, or end the URI of a folder with '/'."
                )
            storage.open_input(file.uri).close()
    except (OSError, pa.ArrowInvalid) as error:
        # If S3 refuses, Arrow raises ArrowInvalid or an OSError with ACCESS_DENIED. Other errors are of the network.
        if not isinstance(error, PermissionError | pa.ArrowInvalid) and "ACCESS_DENIED" not in str(error):
            raise
        raise InvalidUri(f"{uri}: {error}") from error
    return files


def _in_folder(uri: str, prefixes: Sequence[str]) -> list[_File]:
    split = urlsplit(uri)
    folder, _, pattern = split.path.rpartition("/")
    folder_uri = urlunsplit(split._replace(path=f"{folder}/"))
    names = [name for name in storage.list_files(folder_uri) if matches(unquote(pattern), name)]
    if not names:
        raise InvalidUri(f"{uri} names no file in the folder; check the path.")
    return [_File(name, admitted(storage.join(folder_uri, name), prefixes)) for name in names]


def _download(
    client: httpx.Client, files: Sequence[Remote], folder_uri: str, report: Callable[[Report], None]
) -> list[_File]:
    total, arrived, done = sum(file.size for file in files), 0, None
    told = set[str]()

    def count(size: int, length: int) -> None:
        nonlocal arrived, done
        done = done or progress(report, "downloading", total or length)
        arrived += size
        done(arrived)

    def tell(name: str, error: httpx.HTTPError) -> None:
        """Tells the user that the download of the file called `name` was interrupted. Does so only once for each
        file."""
        if name not in told:
            told.add(name)
            reason = str(error) or type(error).__name__
            if isinstance(error, httpx.HTTPStatusError):  # its text has the URL, which may hold a signature
                reason = f"the server answers {error.response.status_code}"
            what = f"The download of {name.partition('?')[0]} broke off ({reason}) and is tried again"
            end = f"the download ends after {len(PAUSES_SECONDS) + 1} failures in a row"
            report(Message(level="warn", message=f"{what}; {end}."))

    copies = [_File(file.name, storage.join(folder_uri, f"{number:05d}")) for number, file in enumerate(files)]
    for copy, file in zip(copies, files, strict=True):
        data = download(client, file.url, count, partial(tell, file.name))
        storage.write_stream(copy.uri, io.BufferedReader(Reader(data)))
    return copies


def _as_one(files: Sequence[_File], uri: str, report: Callable[[Report], None]) -> str:
    """Returns the URI of one uncompressed file that has the lines of all `files`.

    If `files` is a single uncompressed file, its URI is returned. Otherwise the lines of all files are written to
    `uri`, and `uri` is returned.
    """
    if len(files) == 1:
        with storage.open_input(files[0].uri) as file:
            if is_plain(file):
                return files[0].uri
    starts: list[str] = []
    storage.write_stream(uri, io.BufferedReader(Reader(_lines(files, starts))))
    if len(files) > 1:
        more = f" and {len(files) - FILES_NAMED} more" if len(files) > FILES_NAMED else ""
        report(
            Message(
                message=(
                    f"The training data are {len(files)} files, "
                    f"joined in this order: {', '.join(starts[:FILES_NAMED])}{more}."
                )
            )
        )
    return uri


def _lines(files: Sequence[_File], starts: list[str]) -> Iterator[bytes]:
    """Yields the lines of all files, one file after the other. Adds a text to `starts` for each file, such as
    "rows.jsonl from line 101": the file's name, and the number of its first line among the lines of all files."""
    number = 0
    for name, uri in files:
        starts.append(f"{name} from line {number + 1}")
        line = b"\n"
        with storage.open_input(uri) as file:
            try:
                for here, line in enumerate(json_lines(file)):
                    number += 1
                    yield line if here else line.removeprefix(BYTE_ORDER_MARK)
            except InvalidRow as error:
                raise InvalidUri(f"{name}: {error}") from None
        if not line.endswith(b"\n"):
            yield b"\n"


def _check_count(spec: AttemptSpec, uri: str) -> None:
    with storage.open_input(uri) as file:
        rows = sum(1 for _ in islice(filter(bytes.strip, read_lines(file)), MIN_EXAMPLES))
    if rows < MIN_EXAMPLES:
        message = f"Training file has {rows} example(s), but must have at least {MIN_EXAMPLES} examples"
        raise _failed(spec, message, "invalid_n_examples")
