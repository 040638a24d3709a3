"""Tests the life of a sweep: its jobs come one after the other, are evaluated and compared, and hopeless ones stop."""

import json

import httpx
import psycopg
import pytest

from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import FakeRay
from tests.services.control_plane.evaluations.conftest import Engines, until
from tests.services.control_plane.sweeps.conftest import (
    BETA,
    DRIFT,
    SCORE,
    begun,
    body,
    created,
    ended,
    look,
    train,
    trials,
)

pytestmark = pytest.mark.slow


def test_jobs_are_submitted_as_places_become_free_and_the_best_is_named(
    api: httpx.Client, settings: Settings, fake_ray: FakeRay, file_id: str
) -> None:
    made = created(api, **body(file_id, max_running_jobs=1, metric={"name": "eval/loss"}))
    assert (made["status"], made["num_trials"], made["trials"], made["best"]) == ("running", 3, {}, None)
    assert made["request"]["metric"]["goal"] == "minimize"
    for number, (beta, loss) in enumerate(zip((0.05, 0.1, 0.2), (0.6, 0.4, 0.5), strict=True)):
        trial = begun(api, made["id"], number)
        assert len(trials(api, made["id"])) == number + 1  # one job at a time
        assert trial["parameters"] == {BETA: beta}
        job = api.get(f"/fine_tuning/jobs/{trial['job_id']}").json()
        assert job["method"]["dpo"]["hyperparameters"]["beta"] == beta
        assert job["seed"] == made["request"]["job"]["seed"]
        train(settings, fake_ray, trial["job_id"], [0.7, loss])
    found = ended(api, made["id"])
    assert (found["status"], found["trials"]) == ("succeeded", {"succeeded": 3})
    assert (found["best"]["id"], found["best"]["value"]) == ("1", 0.4)
    assert found["best"]["model"].startswith("ft:tiny")


def test_the_value_is_that_of_the_checkpoint_that_became_the_policy(
    api: httpx.Client, settings: Settings, fake_ray: FakeRay, file_id: str
) -> None:
    sweep = body(file_id, metric={"name": "eval/loss"})
    sweep["parameters"] = {"x_raydpo.policy": {"values": ["last", "best"]}}
    made = created(api, **sweep)
    for number in range(2):
        train(settings, fake_ray, begun(api, made["id"], number)["job_id"], [0.7, 0.3, 0.5])
    ended(api, made["id"])
    assert [trial["value"] for trial in trials(api, made["id"])] == [0.5, 0.3]


def test_each_policy_is_evaluated_and_the_frontier_has_its_points(
    api: httpx.Client, settings: Settings, fake_ray: FakeRay, file_id: str, engines: Engines
) -> None:
    sweep = body(file_id, metric={"name": "words/score"}, evaluations={"words": SCORE, "moved": DRIFT})
    made = created(api, **sweep)
    for number in range(3):
        train(settings, fake_ray, begun(api, made["id"], number)["job_id"], [0.5])
    found = ended(api, made["id"])
    assert (found["status"], found["best"]["value"]) == ("succeeded", 3.0)  # a policy answers with three words
    for trial in trials(api, made["id"]):
        evaluation = api.get(f"/x/evaluations/{trial['evaluations']['moved']}").json()
        assert evaluation["model"] == trial["model"]
        assert evaluation["results"] == trial["results"]["moved"]
    frontier = api.get(f"/x/sweeps/{made['id']}/frontier").json()
    assert (frontier["kl"], frontier["reward"]) == ("moved/kl_per_sequence", "words/score")
    assert [point["reward"]["value"] for point in frontier["data"]] == [3.0] * 3
    assert [point["method"] for point in frontier["data"]] == ["dpo"] * 3
    assert [point["on_frontier"] for point in frontier["data"]] == [True, False, False]


def test_a_hopeless_trial_is_stopped_and_gives_its_place_to_the_next(
    api: httpx.Client, settings: Settings, fake_ray: FakeRay, file_id: str
) -> None:
    made = created(api, **body(file_id, max_running_jobs=1, early_stop={"min_trials": 1}))
    train(settings, fake_ray, begun(api, made["id"], 0)["job_id"], [0.6, 0.5, 0.4, 0.3])
    hopeless = begun(api, made["id"], 1)
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        training = json.dumps({"total_steps": 4})
        connection.execute("UPDATE jobs SET training = %s WHERE id = %s", (training, hopeless["job_id"]))
        columns = "id, job_id, step, uri, model_id, metrics"
        row = (hopeless["job_id"], json.dumps({"eval/loss": 0.6}))
        connection.execute(f"INSERT INTO checkpoints ({columns}) VALUES ('c', %s, 2, 'file:///no', 'm', %s)", row)
    until(lambda: trials(api, made["id"])[1]["status"] == "stopped")
    fake_ray.jobs[f"{hopeless['job_id']}-1"] = "STOPPED"
    train(settings, fake_ray, begun(api, made["id"], 2)["job_id"], [0.2])
    assert ended(api, made["id"])["trials"] == {"succeeded": 2, "stopped": 1}
    assert api.get(f"/fine_tuning/jobs/{hopeless['job_id']}").json()["status"] == "cancelled"


def test_a_trial_that_fails_says_why_and_a_sweep_without_success_fails(
    api: httpx.Client, settings: Settings, fake_ray: FakeRay, file_id: str
) -> None:
    made = created(api, **body(file_id, max_running_jobs=3))
    begun(api, made["id"], 2)
    first, *others = trials(api, made["id"])
    for trial in others:
        api.post(f"/fine_tuning/jobs/{trial['job_id']}/cancel")
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        error = json.dumps({"code": "out_of_memory", "message": "It did not fit.", "param": None})
        ends = "observed = 'failed', version = version + 1, finished_at = now(), error = %s"
        connection.execute(f"UPDATE jobs SET {ends} WHERE id = %s", (error, first["job_id"]))
    found = ended(api, made["id"])
    assert (found["status"], found["error"]["code"]) == ("failed", "sweep_failed")
    assert "It did not fit." in found["error"]["message"]
    assert found["trials"] == {"failed": 1, "cancelled": 2}


def test_a_cancelled_sweep_takes_its_jobs_with_it(api: httpx.Client, file_id: str) -> None:
    made = created(api, **body(file_id))
    begun(api, made["id"], 1)
    found = api.post(f"/x/sweeps/{made['id']}/cancel").json()
    assert (found["status"], found["trials"]) == ("cancelled", {"cancelled": 2})
    for trial in trials(api, made["id"]):
        job = api.get(f"/fine_tuning/jobs/{trial['job_id']}").json()
        assert job["status"] in ("running", "cancelled")  # a running job needs a moment
        until(lambda job=job: "Cancellation requested" in api.get(f"/fine_tuning/jobs/{job['id']}/events").text)
    answer = api.post(f"/x/sweeps/{made['id']}/cancel")
    assert answer.status_code == 400
    assert "has already cancelled" in answer.json()["error"]["message"]


def test_a_sweep_waits_while_the_project_may_not_submit_another_job(
    api: httpx.Client, settings: Settings, fake_ray: FakeRay, file_id: str
) -> None:
    made = created(api, **body(file_id, max_running_jobs=1))
    first = begun(api, made["id"], 0)
    limit = "UPDATE projects SET max_accelerator_hours = %s WHERE id = 'proj_default'"
    until(lambda: f"{first['job_id']}-1" in fake_ray.jobs)
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        connection.execute(limit, (0,))
        try:
            train(settings, fake_ray, first["job_id"], [0.5])
            until(lambda: look(api, made["id"])["waits_for"])
            assert "accelerator hours" in look(api, made["id"])["waits_for"]
            assert len(trials(api, made["id"])) == 1
        finally:
            connection.execute(limit, (None,))
    begun(api, made["id"], 1)
    until(lambda: look(api, made["id"])["waits_for"] is None)


@pytest.mark.parametrize("kind", ["random", "tpe"])
def test_a_search_draws_its_values_from_the_ranges(
    api: httpx.Client, settings: Settings, fake_ray: FakeRay, file_id: str, kind: str
) -> None:
    sweep = body(file_id, search={"type": kind, "num_trials": 3, "seed": 3}, metric={"name": "eval/loss"})
    sweep["parameters"] = {BETA: {"min": 0.01, "max": 1, "scale": "log"}}
    made = created(api, **sweep)
    for number in range(3):
        train(settings, fake_ray, begun(api, made["id"], number)["job_id"], [0.5])
    ended(api, made["id"])
    drawn = [trial["parameters"][BETA] for trial in trials(api, made["id"])]
    assert len(set(drawn)) == 3
    assert all(0.01 <= value <= 1 for value in drawn)
