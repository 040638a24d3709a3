"""Tests the life of the evaluations that jobs ask for: they are created once, told of, and end with what they need."""

from datetime import timedelta
from typing import Any

import httpx
import psycopg
import pytest

from services.control_plane.core.errors import OverQuota
from services.control_plane.evaluations import evaluations
from services.control_plane.jobs.checkpoint_evaluations import checkpoint_evaluations
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import FakeRay
from tests.services.control_plane.evaluations.conftest import Engines, until
from tests.services.control_plane.jobs.checkpoint_evaluations.conftest import (
    WORDS,
    all_ended,
    body,
    created,
    events,
    look,
    messages,
    shown,
)
from tests.services.control_plane.sweeps.conftest import train

pytestmark = pytest.mark.slow

COMPARE: dict[str, Any] = {"kind": "compare", "judge": {"type": "length"}}
PAIRS, REWARD = "the file with pairs", "reward_bradley_terry"


def models(api: httpx.Client, job_id: str) -> list[str]:
    """Returns the ends of the names of the job's checkpoints."""
    found = api.get(f"/fine_tuning/jobs/{job_id}/checkpoints").json()["data"]
    return sorted(each["fine_tuned_model_checkpoint"].rpartition("-")[2] for each in found)


@pytest.mark.parametrize(
    ("evaluation", "method", "param", "code"),
    [
        ({"file": "file-0"}, "dpo", "file", "file_not_found"),
        ({"kind": "compare", "baseline": "nobody"}, "dpo", "baseline", "model_not_found"),
        ({"judge": {"type": "model", "model": "nobody"}}, "dpo", "judge.model", "model_not_found"),
        ({"judge": {"type": "implicit"}}, "simpo", "judge.reference", "missing_required_parameter"),
        ({"kind": "preferences", "judge": None, "file": PAIRS}, "orpo", "reference", "missing_required_parameter"),
        ({"kind": "drift", "judge": None}, "simpo", "reference", "missing_required_parameter"),
        ({}, REWARD, "kind", "invalid_value"),
        (
            {"kind": "preferences", "judge": None, "file": PAIRS, "beta": 1},
            "reward_bradley_terry",
            "beta",
            "invalid_value",
        ),
        ({"kind": "preferences", "judge": None}, "dpo", "file", "invalid_value"),  # its rows have one completion each
    ],
)
def test_what_the_jobs_models_cannot_do_is_refused_before_the_job_exists(
    api: httpx.Client, file_id: str, prompts: str, evaluation: dict[str, Any], method: str, param: str, code: str
) -> None:
    given = {name: value for name, value in {**WORDS, "file": prompts, **evaluation}.items() if value is not None}
    given |= {"file": file_id} if given["file"] == PAIRS else {}
    request = body(file_id, evaluations={"a": given}) | {"method": {"type": method}}
    for path in ("/fine_tuning/jobs", "/x/jobs/validate"):
        error = api.post(path, json=request).json()["error"]
        assert (error["param"], error["code"]) == (f"x_raydpo.evaluations.a.{param}", code), error


def test_a_job_shows_its_evaluations_and_can_be_created_again(api: httpx.Client, file_id: str, prompts: str) -> None:
    asked = {"words": WORDS | {"file": prompts, "of": "checkpoints"}, "better": COMPARE | {"file": prompts}}
    first = created(api, file_id, evaluations=asked)
    again = look(api, first)["x_raydpo"]["request"]
    assert again["x_raydpo"]["evaluations"] == {
        "words": asked["words"],
        "better": asked["better"] | {"baseline": "tiny", "of": "policy"},
    }
    answer = api.post("/fine_tuning/jobs", json=again)
    assert answer.json()["x_raydpo"]["request"] == again
    assert shown(api, first) == []
    for job_id in (first, answer.json()["id"]):
        api.post(f"/fine_tuning/jobs/{job_id}/cancel")


def test_a_local_file_is_checked_when_it_is_uploaded(api: httpx.Client, file_id: str) -> None:
    request = body(file_id, evaluations={"words": WORDS | {"file": "./prompts.jsonl"}})
    assert api.post("/x/jobs/validate", json=request).status_code == 200
    assert api.post("/fine_tuning/jobs", json=request).json()["error"]["code"] == "file_not_found"


def test_what_an_evaluation_names_stays_until_the_job_has_ended(
    api: httpx.Client, file_id: str, prompts: str, policy: str
) -> None:
    asked = {"better": COMPARE | {"file": prompts, "baseline": policy}}
    job_id = created(api, file_id, evaluations=asked)
    assert job_id in api.delete(f"/files/{prompts}").json()["error"]["message"]
    assert job_id in api.delete(f"/models/{policy}").json()["error"]["message"]
    api.post(f"/fine_tuning/jobs/{job_id}/cancel")
    assert api.delete(f"/files/{prompts}").json()["deleted"]
    assert api.delete(f"/models/{policy}").json()["deleted"]


def test_the_policy_is_evaluated_once_it_exists_and_the_job_tells_of_it(
    api: httpx.Client, settings: Settings, fake_ray: FakeRay, file_id: str, prompts: str
) -> None:
    job_id = created(api, file_id, evaluations={"words": WORDS | {"file": prompts, "max_items": 2}})
    train(settings, fake_ray, job_id, [0.5, 0.4])
    (found,) = all_ended(api, job_id, 1)
    evaluation = api.get(f"/x/evaluations/{found['id']}").json()
    assert found == {
        "id": evaluation["id"],
        "name": "words",
        "model": look(api, job_id)["fine_tuned_model"],
        "status": "succeeded",
        "waits_for": None,
        "error": None,
    }
    assert (evaluation["model"], evaluation["num_items"]) == (found["model"], 2)
    named = f"Evaluation 'words' of {found['model']}"
    until(lambda: f"{named} succeeded" in messages(api, job_id))
    told = [event for event in events(api, job_id) if event["message"].startswith("Evaluation")]
    assert [event["message"] for event in told] == [f"{named} created: {found['id']}", f"{named} succeeded"]
    assert told[-1]["data"]["results"] == evaluation["results"]
    (listed,) = [job for job in api.get("/fine_tuning/jobs").json()["data"] if job["id"] == job_id]
    assert listed["x_raydpo"]["evaluations"] == [found]


def test_each_checkpoint_is_evaluated_and_stays_until_then(
    api: httpx.Client, settings: Settings, fake_ray: FakeRay, file_id: str, prompts: str, engines: Engines
) -> None:
    engines.is_away = True  # so that no evaluation ends
    asked = {"words": WORDS | {"file": prompts, "of": "checkpoints"}}
    job_id = created(api, file_id, evaluations=asked, keep_checkpoints=1)
    train(settings, fake_ray, job_id, [0.5, 0.4, 0.3])
    until(lambda: look(api, job_id)["status"] == "succeeded")
    until(lambda: len([each for each in shown(api, job_id) if each["id"]]) == 3)
    assert models(api, job_id) == ["1", "2", "3"]
    engines.is_away = False
    found = all_ended(api, job_id, 3)
    assert [(each["model"].rpartition(":")[2], each["status"]) for each in found] == [
        (f"ckpt-step-{step}", "succeeded") for step in (1, 2, 3)
    ]
    assert len({each["id"] for each in found}) == 3


def test_an_evaluation_that_the_quota_refuses_waits_and_is_given_up_after_a_week(
    api: httpx.Client,
    settings: Settings,
    fake_ray: FakeRay,
    file_id: str,
    prompts: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluations, "MOST_LIVE", 0)
    asked = {"words": WORDS | {"file": prompts, "of": "checkpoints"}}
    job_id = created(api, file_id, evaluations=asked, keep_checkpoints=1)
    train(settings, fake_ray, job_id, [0.5, 0.4])
    until(lambda: [each["status"] for each in shown(api, job_id) if each["waits_for"]] == ["waiting"] * 2)
    until(lambda: look(api, job_id)["status"] == "succeeded")
    assert models(api, job_id) == ["1", "2"]  # the first waits, so it stays
    told = [message for message in messages(api, job_id) if " waits: " in message]
    assert len(told) == 2
    assert "After 7 days of this, it is given up." in told[0]
    first = shown(api, job_id)[0]["model"]
    assert "waiting evaluation of the job" in api.delete(f"/models/{first}").json()["error"]["message"]
    monkeypatch.setattr(checkpoint_evaluations, "REFUSED_FOR", timedelta(0))
    found = all_ended(api, job_id, 2)
    assert [each["error"]["code"] for each in found] == [OverQuota("").code] * 2
    assert models(api, job_id) == ["2"]  # nothing needs the first any more
    assert any("Checkpoint of step 1 removed" in message for message in messages(api, job_id))


def test_what_is_refused_for_good_is_told_by_name(
    api: httpx.Client, settings: Settings, fake_ray: FakeRay, file_id: str, prompts: str
) -> None:
    job_id = created(api, file_id, evaluations={"words": WORDS | {"file": prompts}})
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        connection.execute("UPDATE files SET deleted_at = now() WHERE id = %s", (prompts,))
    train(settings, fake_ray, job_id, [0.5])
    (found,) = all_ended(api, job_id, 1)
    assert (found["id"], found["status"], found["error"]["code"]) == (None, "failed", "file_not_found")
    (event,) = [event for event in events(api, job_id) if "cannot be created" in event["message"]]
    assert event["level"] == "warn"
    assert prompts in event["message"]


def test_a_cancelled_job_cancels_its_evaluations(
    api: httpx.Client, settings: Settings, fake_ray: FakeRay, file_id: str, prompts: str, engines: Engines
) -> None:
    engines.is_away = True
    job_id = created(api, file_id, evaluations={"words": WORDS | {"file": prompts, "of": "checkpoints"}})
    train(settings, fake_ray, job_id, [0.5], succeeds=False)
    (evaluation_id,) = until(lambda: [each["id"] for each in shown(api, job_id) if each["id"]])
    api.post(f"/fine_tuning/jobs/{job_id}/cancel")
    fake_ray.jobs[f"{job_id}-1"] = "STOPPED"
    assert [each["status"] for each in all_ended(api, job_id, 1)] == ["cancelled"]
    assert api.get(f"/x/evaluations/{evaluation_id}").json()["status"] == "cancelled"
    until(lambda: any("was cancelled with the job" in message for message in messages(api, job_id)))


def test_an_evaluation_that_fails_or_was_deleted_is_told_of(
    api: httpx.Client, settings: Settings, fake_ray: FakeRay, file_id: str, prompts: str, engines: Engines
) -> None:
    engines.refusing = {"Question"}
    job_id = created(api, file_id, evaluations={"words": WORDS | {"file": prompts}})
    train(settings, fake_ray, job_id, [0.5])
    (found,) = all_ended(api, job_id, 1)
    assert found["status"] == "failed"
    until(lambda: any(" failed: All items failed." in message for message in messages(api, job_id)))
    assert api.delete(f"/x/evaluations/{found['id']}").json()["deleted"]
    (kept,) = shown(api, job_id)
    assert (kept["id"], kept["status"], kept["error"]["code"]) == (found["id"], "failed", "evaluation_failed")


def test_the_deletion_of_a_job_cancels_its_evaluations(
    api: httpx.Client, settings: Settings, fake_ray: FakeRay, file_id: str, prompts: str, engines: Engines
) -> None:
    engines.is_away = True
    job_id = created(api, file_id, evaluations={"words": WORDS | {"file": prompts, "of": "checkpoints"}})
    train(settings, fake_ray, job_id, [0.5])
    until(lambda: look(api, job_id)["status"] == "succeeded")
    (evaluation_id,) = until(lambda: [each["id"] for each in shown(api, job_id) if each["id"]])
    assert api.delete(f"/x/jobs/{job_id}", params={"models": "true"}).status_code == 200
    assert api.get(f"/x/evaluations/{evaluation_id}").json()["status"] == "cancelled"
    with psycopg.connect(settings.database_url) as connection:
        states = connection.execute("SELECT state FROM job_evaluations WHERE job_id = %s", (job_id,))
        assert states.fetchall() == [("cancelled",)]
