"""Tests that sources of every kind become one plain file of JSON Lines. Real servers on loopback provide them."""

import gzip
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from services import storage
from services.contract import AttemptSpec, Message, Progress, Report
from services.training.reports.reporting import JobFailed
from services.training.source import download
from services.training.source.source import as_plain_file
from tests.services.s3 import S3
from tests.services.web import Web, running_web

MakeSpec = Callable[..., AttemptSpec]
Bring = Callable[..., bytes]
ROWS = b"".join(b'{"prompt": "%d", "chosen": "a", "rejected": "b"}\n' % number for number in range(30))
LINES = ROWS.splitlines(keepends=True)


def packed(name: str, data: bytes, folder: Path) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(data)
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist([json.loads(line) for line in data.splitlines()]), folder / "packed")
        return (folder / "packed").read_bytes()
    return data


@pytest.fixture
def reports() -> list[Report]:
    return []


@pytest.fixture
def bring(make_spec: MakeSpec, tmp_path: Path, reports: list[Report]) -> Bring:
    """Returns a function that returns the content of the plain file for a URI, and asserts that no copy is left.

    `prefixes` are those that the operator admits.
    """

    def bring(uri: str, *prefixes: str) -> bytes:
        folder = (tmp_path / "run" / "source").as_uri()
        with as_plain_file(make_spec(training_uri=uri, dataset_uris=prefixes), folder, reports.append) as plain:
            data = storage.read_bytes(plain.training_uri)
        assert not storage.exists(folder)
        return data

    return bring


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(download, "PAUSES_SECONDS", (0.0,))
    with running_web() as web:
        yield web


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def failed(bring: Bring, *arguments: str) -> tuple[str, str]:
    with pytest.raises(JobFailed) as failure:
        bring(*arguments)
    assert failure.value.report.param == "x_raydpo.dataset"
    return failure.value.report.code, failure.value.report.message


# --- storage ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pairs.jsonl.gz", "pairs.parquet"])
def test_a_packed_upload_becomes_plain_and_a_plain_one_is_used_where_it_lies(
    make_spec: MakeSpec, pairs: str, tmp_path: Path, reports: list[Report], name: str
) -> None:
    rows = storage.read_bytes(pairs)
    (tmp_path / name).write_bytes(packed(name, rows, tmp_path))
    upload = make_spec(training_uri=str(tmp_path / name))
    with as_plain_file(upload, str(tmp_path / "source"), reports.append) as plain:
        found = storage.read_bytes(plain.training_uri)
        assert list(map(json.loads, found.splitlines())) == list(map(json.loads, rows.splitlines()))
    with as_plain_file(make_spec(), str(tmp_path / "not needed"), reports.append) as plain:
        assert plain == make_spec()
        assert not (tmp_path / "not needed").exists()
    assert not (tmp_path / "source").exists()
    assert not reports


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows 100%.parquet"])
def test_one_file_on_s3_or_here(bring: Bring, s3: S3, folder: Path, name: str) -> None:
    data = packed(name, ROWS, folder)
    for root in (s3.new_folder(), f"{folder.as_uri()}/"):
        uri = storage.join(root, name)
        storage.write_bytes(uri, data)
        assert bring(uri, root) == ROWS


def test_a_plain_file_on_s3_is_not_copied(make_spec: MakeSpec, s3: S3, tmp_path: Path) -> None:
    folder = s3.new_folder()
    uri = storage.join(folder, "plain.jsonl")
    storage.write_bytes(uri, ROWS)
    spec = make_spec(training_uri=uri, dataset_uris=(folder,))
    with as_plain_file(spec, (tmp_path / "source").as_uri(), lambda _: None) as plain:
        assert plain.training_uri == uri
        assert not (tmp_path / "source").exists()


def test_a_folder_and_a_star_mean_all_their_files_in_order_of_name(
    bring: Bring, reports: list[Report], s3: S3, folder: Path
) -> None:
    # The second ends without a newline and the third begins with a byte order mark.
    parts = {"b.jsonl": LINES[4:20], "c.jsonl": LINES[20:], "a.jsonl.gz": LINES[:4], "_SUCCESS": [b"no row"]}
    for root in (s3.new_folder(), f"{folder.as_uri()}/"):
        for name, lines in parts.items():
            data = b"".join(lines).removesuffix(b"\n" if name == "b.jsonl" else b"")
            data = b"\xef\xbb\xbf" * (name == "c.jsonl") + packed(name, data, folder.parent)
            storage.write_bytes(storage.join(root, name), data)
        storage.write_bytes(storage.join(root, "deeper", "d.jsonl"), b"not this one")
        assert bring(root, root) == ROWS
        joined = (
            "The training data are 3 files, joined in this order: a.jsonl.gz from line 1, b.jsonl from line 5, "
            "c.jsonl from line 21."
        )
        assert reports.pop() == Message(message=joined)
        assert bring(root.replace("/?", "/*.jsonl?") if "?" in root else f"{root}*.jsonl", root) == b"".join(LINES[4:])


def test_nothing_is_left_out_silently(bring: Bring, s3: S3, folder: Path) -> None:
    for root in (s3.new_folder(), f"{folder.as_uri()}/"):
        assert failed(bring, root, root) == (
            "invalid_training_file",
            (f"{root} names no file in the folder; check the path."),
        )
        storage.write_bytes(storage.join(root, "inner", "rows.jsonl"), ROWS)
        for name in ("missing.jsonl", "inner"):
            uri = storage.join(root, name)
            message = (
                f"{uri} is not a file that the service can read; correct the URI, or end the URI of a folder with '/'."
            )
            assert failed(bring, uri, root) == ("invalid_training_file", message)
    (folder / "broken.jsonl.gz").write_bytes(gzip.compress(ROWS)[:-9])
    code, message = failed(bring, f"{folder.as_uri()}/broken.jsonl.gz", folder.as_uri())
    assert code == "invalid_training_file"
    assert "broken.jsonl.gz: The file is damaged after line" in message


def test_what_is_not_admitted_is_not_read(bring: Bring, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_bytes(ROWS)
    (folder / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    root = f"{folder.as_uri()}/"
    for uri in (f"{root}link.jsonl", root, f"{root}*.jsonl", f"{root}../secret.jsonl", "s3://bucket/a", "http://a/b"):
        code, message = failed(bring, uri, root, "https://")
        assert (code, "is not allowed" in message) == ("invalid_training_file", True)


def test_a_refusal_of_s3_is_the_users_to_mend(bring: Bring, s3: S3, web: Web) -> None:
    web.statuses["/bucket/rows.jsonl"] = [403] * 9
    options = f"?scheme=http&region=us-east-1&endpoint_override=127.0.0.1%3A{web.port}"
    code, message = failed(bring, f"s3://bucket/rows.jsonl{options}", f"s3://{options}")
    assert (code, "ACCESS_DENIED" in message) == ("invalid_training_file", True)


@pytest.mark.slow
def test_a_storage_that_does_not_answer_is_left_to_the_next_attempt(bring: Bring, s3: S3) -> None:
    nobody = "?scheme=http&region=us-east-1&endpoint_override=127.0.0.1%3A9"
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        bring(f"s3://bucket/a.jsonl{nobody}", f"s3://bucket/{nobody}")


def test_a_file_that_changes_while_it_is_used_ends_the_attempt(make_spec: MakeSpec, folder: Path) -> None:
    (folder / "rows.jsonl").write_bytes(ROWS)
    spec = make_spec(training_uri=f"{folder.as_uri()}/rows.jsonl", dataset_uris=("file:///",))
    plain = as_plain_file(spec, (folder / "source").as_uri(), lambda _: None)
    with pytest.raises(OSError, match=r"rows\.jsonl changed while it was being read"), plain:
        (folder / "rows.jsonl").write_bytes(ROWS + LINES[0])


# --- rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 9])
def test_too_few_examples_are_refused_with_both_numbers(bring: Bring, folder: Path, rows: int) -> None:
    (folder / "few.jsonl").write_bytes(b"\n\n".join(LINES[:rows]) + b"\n\n")
    message = f"Training file has {rows} example(s), but must have at least 10 examples"
    assert failed(bring, f"{folder.as_uri()}/few.jsonl", "file:///") == ("invalid_n_examples", message)


# --- the web ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_a_file_from_the_web_is_downloaded_and_told_in_bytes(
    bring: Bring, web: Web, reports: list[Report], tmp_path: Path, name: str
) -> None:
    data = web.files[f"/{name}"] = packed(name, ROWS, tmp_path)
    web.cuts = [len(data) // 2]
    assert bring(f"{web.url}/{name}?token=x", f"{web.url}/") == ROWS
    told = [report for report in reports if isinstance(report, Progress)]
    assert {(report.stage, report.total) for report in told} == {("downloading", len(data))}
    assert (told[0].done, told[-1].done) == (0, len(data))
    (warning,) = [report.message for report in reports if isinstance(report, Message) and report.level == "warn"]
    assert warning.startswith(f"The download of {web.url}/{name} broke off (")


def test_the_webs_refusals_are_the_users_to_mend_and_its_failures_are_not(bring: Bring, web: Web) -> None:
    uri = f"{web.url}/rows.jsonl"
    assert failed(bring, uri, web.url) == (
        "invalid_training_file",
        f"The request for {uri} was answered with 404 Not Found; check the URL and who may read it.",
    )
    assert "not public" in failed(bring, uri, "http://")[1]
    web.statuses["/rows.jsonl"] = [503] * 9
    with pytest.raises(httpx.HTTPStatusError):
        bring(uri, web.url)


def test_a_download_never_stands_whole_in_memory(make_spec: MakeSpec, web: Web, tmp_path: Path) -> None:
    web.files["/rows.jsonl"] = ROWS * (2**26 // len(ROWS))
    spec = make_spec(training_uri=f"{web.url}/rows.jsonl", dataset_uris=(web.url,))
    tracemalloc.start()
    with as_plain_file(spec, (tmp_path / "source").as_uri(), lambda _: None) as plain:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert storage.version(plain.training_uri)[0] == len(web.files["/rows.jsonl"])
    assert peak < 2**24
