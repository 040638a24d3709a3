"""Tests datasets of the Hugging Face hub with a server on loopback in place of the hub.

They are read in a separate process, because HF_ENDPOINT is read when the process starts.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from services import storage
from services.contract import AttemptSpec
from tests.services.web import Web, running_web

ROWS = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 5
FILES = {"README.md": b"# none", "rows.jsonl": ROWS * 2, "data/b.jsonl": ROWS, "data/a.jsonl": ROWS, "data/x/c": b""}
COMMIT = "c" * 40
SCRIPT = """
import json, sys
from services import storage
from services.contract import AttemptSpec
from services.training.source import download
from services.training.reports.reporting import JobFailed
from services.training.source.source import as_plain_file

download.PAUSES_SECONDS = (0.0,)
reports = []
spec = AttemptSpec.model_validate_json(sys.stdin.read())
try:
    with as_plain_file(spec, spec.run_uri, reports.append) as plain:
        print(json.dumps([storage.read_bytes(plain.training_uri).decode(), [r.model_dump() for r in reports]]))
except JobFailed as failure:
    print(json.dumps([failure.report.code, failure.report.message]))
"""
Read = Callable[..., Any]


@pytest.fixture
def web() -> Iterator[Web]:
    """Starts the server. Its files are on another host name, as those of the real hub are."""
    with running_web() as web:
        info = {"id": "org/name", "sha": COMMIT, "private": False, "downloads": 0, "likes": 0, "tags": []}
        info["siblings"] = [{"rfilename": name, "size": len(data)} for name, data in FILES.items()]
        web.files["/api/datasets/org/name"] = json.dumps(info).encode()
        web.files["/api/datasets/org/name/revision/v1"] = web.files["/api/datasets/org/name"]
        for name, data in FILES.items():
            web.redirects[f"/datasets/org/name/resolve/{COMMIT}/{name}"] = f"http://localhost:{web.port}/store/{name}"
            web.files[f"/store/{name}"] = data
        yield web


@pytest.fixture
def read(web: Web, make_spec: Callable[..., AttemptSpec], tmp_path: Path) -> Read:
    def read(uri: str, prefix: str = "hf://datasets/org/") -> Any:
        spec = make_spec(training_uri=uri, dataset_uris=(prefix,))
        private = {"HF_ENDPOINT": web.url, "HF_TOKEN": "hf_secret", "HF_HOME": str(tmp_path), "no_proxy": "*"}
        command = [sys.executable, "-c", SCRIPT]
        done = subprocess.run(command, input=spec.model_dump_json(), env=os.environ | private, stdout=-1, text=True)
        assert done.returncode == 0
        assert not storage.exists(spec.run_uri)
        return json.loads(done.stdout)

    return read


@pytest.mark.slow
def test_a_file_comes_from_the_commit_and_the_token_goes_to_the_hub_alone(read: Read, web: Web) -> None:
    web.cuts = [None, 100]
    rows, reports = read("hf://datasets/org/name@v1/rows.jsonl")
    assert rows.encode() == FILES["rows.jsonl"]
    assert (reports[-1]["stage"], reports[-1]["done"], reports[-1]["total"]) == ("downloading", len(rows), len(rows))
    requests = [(path.partition("?")[0], headers.get("authorization")) for path, headers in web.requests]
    asked = [(path, token) for path, token in requests if path != "/api/agent-harnesses"]  # the client's own affair
    file = [(f"/datasets/org/name/resolve/{COMMIT}/rows.jsonl", "Bearer hf_secret"), ("/store/rows.jsonl", None)]
    assert asked == [("/api/datasets/org/name/revision/v1", "Bearer hf_secret"), *file, *file]
    assert web.requests[-1][1]["range"] == "bytes=100-"


@pytest.mark.slow
def test_a_hub_that_does_not_answer_at_once_is_told_and_asked_again(read: Read, web: Web) -> None:
    web.statuses["/api/datasets/org/name/revision/v1"] = [503]
    rows, reports = read("hf://datasets/org/name@v1/rows.jsonl")
    assert rows.encode() == FILES["rows.jsonl"]
    told = [report["message"] for report in reports if report.get("level") == "warn"]
    uri = "hf://datasets/org/name@v1/rows.jsonl"
    assert told == [f"The Hugging Face hub answers 503. It is asked for {uri} again, up to 5 times."]


@pytest.mark.slow
def test_the_services_token_is_for_organizations_that_a_prefix_names(read: Read, web: Web) -> None:
    read("hf://datasets/org/name@v1/rows.jsonl", "hf://datasets/")
    assert {headers.get("authorization") for _, headers in web.requests} == {None}


@pytest.mark.slow
@pytest.mark.parametrize("uri", ["hf://datasets/org/name/data/", "hf://datasets/org/name/data/*.jsonl"])
def test_a_folder_means_its_files(read: Read, uri: str) -> None:
    rows, reports = read(uri)
    assert rows.encode() == ROWS * 2
    assert reports[-2]["total"] == len(ROWS) * 2
    joined = "The training data are 2 files, joined in this order: data/a.jsonl from line 1, data/b.jsonl from line 6."
    assert reports[-1]["message"] == joined


@pytest.mark.slow
@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("hf://datasets/org/name/missing.jsonl", "names no file of the dataset"),
        ("hf://datasets/org/name//rows.jsonl", "empty segments"),
        ("hf://datasets/org/name@v2/rows.jsonl", "404"),
        ("hf://datasets/org/private/rows.jsonl", "The Hugging Face hub answers 401"),
    ],
)
def test_what_the_hub_does_not_give_is_the_users_to_mend(read: Read, web: Web, uri: str, said: str) -> None:
    web.statuses["/api/datasets/org/private"] = [401]
    code, message = read(uri)
    assert code == "invalid_training_file"
    assert uri in message
    assert said in message
