"""Tests random requests to the routes of the service's OpenAPI document: none crashes, and all errors have one
format."""

from typing import Any

import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.schemas import APIOperation

from services.control_plane.app import create_app
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import API_KEY, pairs

HEADERS = {"Authorization": f"Bearer {API_KEY}"}
NOWHERE = dict.fromkeys(("DATABASE_URL", "storage_url", "advertised_url", "ray_url"), "http://nowhere")
document = schemathesis.openapi.from_dict(create_app(Settings(**NOWHERE, api_key=API_KEY)).openapi())
OPERATIONS = [found.ok() for found in document.get_all_operations()]


@pytest.fixture(scope="module")
def real(client: openai.OpenAI) -> dict[str, str]:
    """Returns names of objects that exist, by the parameters of paths."""
    file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method={"type": "dpo"})
    client.fine_tuning.jobs.cancel(job.id)  # so that its stream ends
    judged = {"kind": "score", "model": "tiny", "judge": {"type": "length"}, "rows": [{"prompt": "Hello"}]}
    evaluation: Any = client.post("/x/evaluations", body=judged, cast_to=object)
    searched = {
        "job": {"model": "tiny", "training_file": file.id, "method": {"type": "dpo"}},
        "parameters": {"seed": {"values": [1, 2]}},
    }
    sweep: Any = client.post("/x/sweeps", body=searched, cast_to=object)
    rounds: Any = client.post(
        "/x/rounds", body={"model": "tiny", "judge": {"type": "length"}, "rows": [{"prompt": "Hello"}]}, cast_to=object
    )
    names = {"evaluation_id": evaluation["id"], "sweep_id": sweep["id"], "rounds_id": rounds["id"]}
    return {"file_id": file.id, "job_id": job.id, "model_id": "tiny", **names}


def check(answer: Any) -> None:
    said = f"{answer.request.method} {answer.request.url}: {answer.status_code} {answer.text[:500]}"
    if answer.status_code < 300:
        return
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}, said
    assert isinstance(error["message"], str), said
    assert error["message"], said
    assert isinstance(error["code"], str | None), said
    assert isinstance(error["param"], str | None), said
    assert "Traceback" not in answer.text, said
    # Nothing answers at Ray's address here.
    assert answer.status_code < 500 or (answer.status_code == 503 and "retry-after" in answer.headers), said


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
@given(data=st.data())
@settings(
    max_examples=15,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_no_request_is_answered_by_a_crash(
    operation: APIOperation, data: st.DataObject, base_url: str, real: dict[str, str]
) -> None:
    case = data.draw(operation.as_strategy())
    check(case.call(base_url=base_url, headers=HEADERS))
    if known := real.keys() & set(case.path_parameters or {}):
        case.path_parameters = case.path_parameters | {name: real[name] for name in known}
        check(case.call(base_url=base_url, headers=HEADERS))
