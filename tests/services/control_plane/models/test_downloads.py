"""Tests GET /v1/models/{id}/content, which sends the weights of trained models as tar files.

The tests end the jobs of a stand-in for Ray, which merge adapters.
"""

import base64
import hashlib
import io
import json
import shlex
import tarfile
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psycopg
import pytest

from services import storage
from services.contract import Failed, MergeReport, MergeRequest, SideJobResult
from services.control_plane import side_jobs
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import FakeRay, api_of, new_key, new_project

JOB = "ftjob-0123456789abcdef01234567"
WHOLE, ADAPTER, SLASHED = (f"ft:{name}:raydpo::{JOB[6:]}" for name in ("whole", "adapter", "org/adapter"))
WEIGHTS = bytes(range(256)) * 10_000  # some chunks


@pytest.fixture(scope="module")
def settings(offline: Settings, fake_ray: FakeRay) -> Settings:
    ray_url = f"http://127.0.0.1:{fake_ray.server.server_port}"
    return offline.model_copy(update={"ray_url": ray_url})


@pytest.fixture
def folders(settings: Settings, base_url: str, fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Adds three trained models with files in storage. The stand-in for Ray has no jobs for them."""
    monkeypatch.setattr(side_jobs, "WAIT_SECONDS", 0.2)
    monkeypatch.setattr(side_jobs, "POLL_SECONDS", 0.02)
    fake_ray.jobs.clear()
    fake_ray.submissions.clear()
    with psycopg.connect(settings.database_url, autocommit=True) as rows:
        for table in ("checkpoint_permissions", "models", "jobs", "checks"):
            rows.execute(f"DELETE FROM {table}")
        columns = "id, project_id, spec, model_source, model_root, priority, desired, observed, version"
        values = f"'{JOB}', 'proj_default', '{{\"model\": \"tiny\"}}', '/m', 'tiny', 0, 'pause', 'paused', 1"
        rows.execute(f"INSERT INTO jobs ({columns}) VALUES ({values})")
        for name in (WHOLE, ADAPTER, SLASHED):
            folder = storage.join(settings.storage_url, "runs", name.replace("/", "-"), "export")
            files = {"model.safetensors": WEIGHTS, "chat_template.jinja": b"template", "sub/part.json": b"{}"}
            base = None
            if name != WHOLE:
                base = "/nowhere/tiny"
                files["effect.json"] = b"rows of training data, which are not for everybody"
                files["adapter_config.json"] = json.dumps({"base_model_name_or_path": base, "r": 4}).encode()
            for file, content in files.items():
                storage.write_bytes(storage.join(folder, *file.split("/")), content)
            options = base and json.dumps({"r": 4, "quantization": "nf4"})
            rows.execute(
                "INSERT INTO models (id, project_id, source, root, job_id, base_source, adapter) "
                "VALUES (%s, 'proj_default', %s, 'tiny', %s, %s, %s)",
                (name, folder, JOB, base, options),
            )
    yield
    storage.delete(storage.join(settings.storage_url, "merged"))


def content(api: httpx.Client, name: str, query: str = "", **headers: str) -> httpx.Response:
    return api.get(f"/models/{name}/content{query}", headers=headers)


def files_in(answer: httpx.Response) -> dict[str, bytes]:
    assert answer.is_success, answer.text
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def refusal(answer: httpx.Response, status: int, code: str | None) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code
    return str(error["message"])


@pytest.mark.parametrize("query", ["", "?format=merged"])
def test_a_policy_with_all_weights_is_its_folder(folders: None, api: httpx.Client, query: str) -> None:
    answer = content(api, WHOLE, query)
    files = files_in(answer)
    assert list(files) == ["chat_template.jinja", "model.safetensors", "raydpo.json", "sub/part.json"]
    assert (files["model.safetensors"], files["chat_template.jinja"]) == (WEIGHTS, b"template")
    about = json.loads(files["raydpo.json"])
    assert (about["model"], about["format"], about["base"], about["merge"]) == (WHOLE, "merged", None, None)
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert content(api, WHOLE, query).content == answer.content


@pytest.mark.parametrize("name", [ADAPTER, SLASHED, SLASHED.replace("/", "%2F")])
def test_an_adapter_comes_without_its_base_and_names_it(folders: None, api: httpx.Client, name: str) -> None:
    files = files_in(content(api, name))
    assert json.loads(files["adapter_config.json"]) == {"base_model_name_or_path": "tiny", "r": 4}
    assert "effect.json" not in files
    about = json.loads(files["raydpo.json"])
    assert (about["format"], about["base"], about["quantization"]) == ("adapter", "tiny", "nf4")
    assert api.get(f"/models/{name}").json()["object"] == "model"


def test_a_download_that_broke_off_is_resumed_at_any_byte(folders: None, api: httpx.Client) -> None:
    whole = content(api, ADAPTER)
    etag = whole.headers["etag"]
    for cut in (0, 1, 511, 512, 1000, 2_100_000, len(whole.content) - 1):
        rest = content(api, ADAPTER, **{"Range": f"bytes={cut}-", "If-Range": etag})
        assert rest.status_code == 206
        assert rest.content == whole.content[cut:]
        assert rest.headers["content-range"] == f"bytes {cut}-{len(whole.content) - 1}/{len(whole.content)}"
    part = content(api, ADAPTER, Range="bytes=100-2000000")
    assert part.content == whole.content[100:2_000_001]
    behind = content(api, ADAPTER, Range=f"bytes={len(whole.content)}-")
    assert "asks for" in refusal(behind, 416, None)


def test_files_that_were_written_anew_begin_the_download_anew(
    folders: None, api: httpx.Client, settings: Settings
) -> None:
    before = content(api, ADAPTER)
    folder = storage.join(settings.storage_url, "runs", ADAPTER, "export")
    storage.write_bytes(storage.join(folder, "model.safetensors"), WEIGHTS[::-1])
    resumed = content(api, ADAPTER, **{"Range": "bytes=1000-", "If-Range": before.headers["etag"]})
    assert resumed.status_code == 200
    assert resumed.headers["etag"] != before.headers["etag"]
    assert files_in(resumed)["model.safetensors"] == WEIGHTS[::-1]


def test_the_digest_is_of_the_whole_and_told_who_asks(folders: None, api: httpx.Client) -> None:
    asked = {"Want-Repr-Digest": "sha-256=1", "Range": "bytes=0-0"}
    first = content(api, WHOLE, **asked)  # before anybody read it
    whole = content(api, WHOLE)
    expected = base64.b64encode(hashlib.sha256(whole.content).digest()).decode()
    assert (
        first.headers["repr-digest"] == content(api, WHOLE, **asked).headers["repr-digest"] == f"sha-256=:{expected}:"
    )
    assert "repr-digest" not in whole.headers


def test_the_merged_model_is_made_once_and_then_streamed(
    folders: None, api: httpx.Client, fake_ray: FakeRay, settings: Settings
) -> None:
    for _ in range(2):
        waiting = content(api, ADAPTER, "?format=merged")
        assert "is being merged into its base model, for" in refusal(waiting, 503, "model_merging")
        assert int(waiting.headers["retry-after"]) > 0
    (submission,) = fake_ray.submissions
    *command, uri = shlex.split(submission["entrypoint"])
    assert command[-1] == "services.training.merge_program"
    request = MergeRequest.model_validate_json(storage.read_bytes(uri))
    assert request.adapter_uri.partition("?")[0].endswith("/export")
    finish(fake_ray, request, MergeReport(**report(request)))
    answer = content(api, ADAPTER, "?format=merged")
    files = files_in(answer)
    assert list(files) == ["model.safetensors", "raydpo.json"]
    merge = json.loads(files["raydpo.json"])["merge"]
    assert merge == {"dtype": "float32", "largest_difference": 2e-6, "difference_of": "logprobs", "num_tokens": 128}
    assert answer.headers["etag"] != content(api, ADAPTER).headers["etag"]
    assert len(fake_ray.submissions) == 1
    api.delete(f"/models/{ADAPTER}")
    assert storage.list_tree(storage.join(settings.storage_url, "merged")) == []


def report(request: MergeRequest) -> dict[str, Any]:
    uri = storage.join(request.folder_uri, "model")
    storage.write_bytes(storage.join(uri, "model.safetensors"), WEIGHTS)
    return {"model_uri": uri, "largest_difference": 2e-6, "difference_of": "logprobs", "num_tokens": 128}


def finish(ray: FakeRay, request: MergeRequest, outcome: MergeReport | Failed) -> None:
    """Ends the newest job with this result."""
    told = {"error": outcome} if isinstance(outcome, Failed) else {"report": outcome.model_dump()}
    result = SideJobResult.model_validate({"finished_at": time.time()} | told)
    storage.write_bytes(storage.join(request.folder_uri, "report.json"), result.model_dump_json().encode())
    ray.jobs[ray.submissions[-1]["submission_id"]] = "SUCCEEDED"


def test_an_adapter_that_cannot_be_merged_is_refused_with_the_reason(
    folders: None, api: httpx.Client, fake_ray: FakeRay
) -> None:
    content(api, ADAPTER, "?format=merged")
    request = MergeRequest.model_validate_json(
        storage.read_bytes(shlex.split(fake_ray.submissions[-1]["entrypoint"])[-1])
    )
    finish(fake_ray, request, Failed(code="unmergeable", message="Its base is gone.", param="format"))
    assert refusal(content(api, ADAPTER, "?format=merged"), 400, "unmergeable") == "Its base is gone."


def test_a_merge_that_died_is_tried_again(folders: None, api: httpx.Client, fake_ray: FakeRay) -> None:
    content(api, ADAPTER, "?format=merged")
    fake_ray.jobs[fake_ray.submissions[-1]["submission_id"]] = "FAILED"
    refusal(content(api, ADAPTER, "?format=merged"), 503, "model_merging")
    assert len({submission["submission_id"] for submission in fake_ray.submissions}) == 2


def test_what_cannot_be_downloaded_is_refused_by_name(folders: None, api: httpx.Client) -> None:
    assert "'tiny' is a base model" in refusal(content(api, "tiny"), 400, "invalid_value")
    assert "has no adapter, because its job trained all weights" in refusal(
        content(api, WHOLE, "?format=adapter"), 400, "invalid_value"
    )
    refusal(content(api, WHOLE, "?format=gguf"), 400, "invalid_value")
    refusal(content(api, WHOLE, "?formt=merged"), 400, "unknown_parameter")
    refusal(content(api, "ft:none"), 404, "model_not_found")


def test_a_project_that_a_model_is_shared_with_uses_it_and_does_not_get_its_weights(
    folders: None, api: httpx.Client, base_url: str
) -> None:
    project = new_project(api, "friends")
    with api_of(base_url, new_key(api, project_id=project)["value"]) as friends:
        refusal(content(friends, WHOLE), 404, "model_not_found")
        api.post(f"/fine_tuning/checkpoints/{WHOLE}/permissions", json={"project_ids": [project]})
        assert friends.get(f"/models/{WHOLE}").is_success
        assert "Your project may use it but not download it" in refusal(content(friends, WHOLE), 403, None)


def test_a_merged_download_does_not_hold_the_weights_of_another_project(
    folders: None, api: httpx.Client, settings: Settings
) -> None:
    project = new_project(api, "lenders")
    with psycopg.connect(settings.database_url, autocommit=True) as rows:
        rows.execute("UPDATE models SET source = '/nowhere/tiny', project_id = %s WHERE id = %s", (project, WHOLE))
    assert "send format=adapter" in refusal(content(api, ADAPTER, "?format=merged"), 403, None)
    assert content(api, ADAPTER, "?format=adapter").is_success


def test_files_that_are_gone_are_unavailable(folders: None, api: httpx.Client, settings: Settings) -> None:
    storage.delete(storage.join(settings.storage_url, "runs", WHOLE, "export"))
    assert "are not in storage any more" in refusal(content(api, WHOLE), 503, "model_unavailable")
