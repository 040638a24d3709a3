"""Tests the life of a sweep: its jobs come one after the other, are evaluated and compared, and hopeless ones stop."""

import json

import httpx
import psycopg
import pytest

from services.control_plane.core.errors import InvalidRequest, OverQuota
from services.control_plane.jobs.plans import plans
from services.control_plane.jobs.plans.plans import DOES_NOT_FIT
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import EVERY_SCOPE, FakeRay, api_of, new_key
from tests.services.control_plane.evaluations.conftest import Engines, chats, until
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
        assert trial["results"]["moved"] == evaluation["results"] | {"num_failed": 0}
    frontier = api.get(f"/x/sweeps/{made['id']}/frontier").json()
    assert (frontier["kl"], frontier["reward"]) == ("moved/kl_per_sequence", "words/score")
    assert [point["reward"]["value"] for point in frontier["data"]] == [3.0] * 3
    assert [point["method"] for point in frontier["data"]] == ["dpo"] * 3
    assert [point["on_frontier"] for point in frontier["data"]] == [True, False, False]


def is_project_free(connection: psycopg.Connection[tuple[int]]) -> bool:
    try:
        connection.execute("SELECT FROM projects FOR NO KEY UPDATE NOWAIT")
    except psycopg.errors.LockNotAvailable:
        return False
    return True


def make_hopeless(settings: Settings, job_id: str) -> None:
    """Reports a bad `eval/loss` in the middle of the job."""
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        training = json.dumps({"total_steps": 4})
        connection.execute("UPDATE jobs SET training = %s WHERE id = %s", (training, job_id))
        columns = "id, job_id, step, uri, model_id, metrics"
        row = (f"c-{job_id}", job_id, json.dumps({"eval/loss": 0.6}))
        connection.execute(f"INSERT INTO checkpoints ({columns}) VALUES (%s, %s, 2, 'file:///no', 'm', %s)", row)


def test_a_hopeless_trial_is_stopped_and_gives_its_place_to_the_next(
    api: httpx.Client, settings: Settings, fake_ray: FakeRay, file_id: str
) -> None:
    made = created(api, **body(file_id, max_running_jobs=1, early_stop={"min_trials": 1}))
    train(settings, fake_ray, begun(api, made["id"], 0)["job_id"], [0.6, 0.5, 0.4, 0.3])
    hopeless = begun(api, made["id"], 1)
    make_hopeless(settings, hopeless["job_id"])
    until(lambda: trials(api, made["id"])[1]["status"] == "stopped")
    fake_ray.jobs[f"{hopeless['job_id']}-1"] = "STOPPED"
    train(settings, fake_ray, begun(api, made["id"], 2)["job_id"], [0.2])
    assert ended(api, made["id"])["trials"] == {"succeeded": 2, "stopped": 1}
    assert api.get(f"/fine_tuning/jobs/{hopeless['job_id']}").json()["status"] == "cancelled"


def test_a_sweep_that_waits_for_a_job_holds_no_lock_of_its_project(
    api: httpx.Client, settings: Settings, fake_ray: FakeRay, file_id: str, engines: Engines
) -> None:
    made = created(api, **body(file_id, max_running_jobs=3, early_stop={"min_trials": 1}, evaluations={"few": SCORE}))
    first, hopeless, last = (begun(api, made["id"], number)["job_id"] for number in range(3))
    train(settings, fake_ray, first, [0.6, 0.5, 0.4, 0.3])
    until(lambda: trials(api, made["id"])[0]["status"] == "succeeded")
    with psycopg.connect(settings.database_url) as look_away, psycopg.connect(settings.database_url) as ending:
        look_away.execute("SELECT FROM sweeps WHERE id = %s FOR UPDATE", (made["id"],))
        make_hopeless(settings, hopeless)
        train(settings, fake_ray, last, [0.2])
        until(lambda: api.get(f"/fine_tuning/jobs/{last}").json()["status"] == "succeeded")
        ending.execute("SELECT FROM jobs WHERE id = %s FOR UPDATE", (hopeless,))
        look_away.commit()  # the sweep now evaluates the last policy, and waits to stop the hopeless job
        look_away.autocommit = True  # each look sees who waits then
        waits = "%s = ANY(pg_blocking_pids(pid)) AND relation = 'sweeps'::regclass AND mode = 'RowShareLock'"
        sweeping = f"SELECT count(*) FROM pg_locks WHERE {waits}"

        def is_waiting() -> bool:
            return look_away.execute(sweeping, (ending.info.backend_pid,)).fetchone() != (0,)

        until(is_waiting)
        until(lambda: is_project_free(look_away))  # the end of the job's attempt locks the project as well
        assert is_waiting()
    until(lambda: trials(api, made["id"])[1]["status"] == "stopped")
    fake_ray.jobs[f"{hopeless}-1"] = "STOPPED"
    assert ended(api, made["id"])["trials"] == {"succeeded": 2, "stopped": 1}


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


def test_few_failed_items_are_counted_and_many_fail_the_trial(
    api: httpx.Client, settings: Settings, fake_ray: FakeRay, file_id: str, engines: Engines
) -> None:
    engines.refusing = {"Question 11"}  # one of twelve, and of one
    both = {"many": SCORE | {"rows": chats(12)}, "few": SCORE | {"rows": chats(12)[9:]}}
    sweep = body(file_id, evaluations=both)
    sweep["parameters"] = {BETA: {"values": [0.1]}}
    made = created(api, **sweep)
    train(settings, fake_ray, begun(api, made["id"], 0)["job_id"], [0.5])
    assert ended(api, made["id"])["status"] == "failed"
    (trial,) = trials(api, made["id"])
    assert {name: each["num_failed"] for name, each in trial["results"].items()} == {"many": 1}
    assert (trial["status"], trial["error"]["code"]) == ("failed", "evaluation_incomplete")
    assert "1 of 3 failed" in trial["error"]["message"]


def test_a_sweep_waits_while_no_machine_that_its_job_fits_is_there(
    api: httpx.Client, settings: Settings, file_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse_by_quota(*_: object) -> None:
        raise OverQuota("No more jobs now.")

    async def refuse(*_: object) -> None:
        raise InvalidRequest("The job cannot fit.", code=DOES_NOT_FIT)

    made = created(api, **body(file_id, max_running_jobs=1))
    first = begun(api, made["id"], 0)["job_id"]
    with monkeypatch.context() as patch:
        patch.setattr(plans, "refuse_hopeless", refuse)
        api.post(f"/fine_tuning/jobs/{first}/cancel")
        told = "The job cannot fit. After 7 days of this, the trial fails."
        until(lambda: look(api, made["id"])["waits_for"] == told)
        patch.setattr(plans, "refuse_hopeless", refuse_by_quota)
        until(lambda: look(api, made["id"])["waits_for"] == "No more jobs now.")
        with psycopg.connect(settings.database_url) as connection:
            since = "SELECT misfit_since FROM sweeps WHERE id = %s"
            assert connection.execute(since, [made["id"]]).fetchone() == (None,)
    assert begun(api, made["id"], 1)["status"] == "training"


def test_trials_whose_jobs_have_not_fit_for_a_week_fail(
    api: httpx.Client, settings: Settings, file_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object) -> None:
        raise InvalidRequest("The job cannot fit.", code=DOES_NOT_FIT)

    made = created(api, **body(file_id, max_running_jobs=1))
    first = begun(api, made["id"], 0)["job_id"]
    with monkeypatch.context() as patch:
        patch.setattr(plans, "refuse_hopeless", refuse)
        api.post(f"/fine_tuning/jobs/{first}/cancel")
        until(lambda: look(api, made["id"])["waits_for"])
        with psycopg.connect(settings.database_url) as connection:
            begun_at = "UPDATE sweeps SET misfit_since = misfit_since - interval '8 days' WHERE id = %s"
            connection.execute(begun_at, [made["id"]])
        assert ended(api, made["id"])["status"] == "failed"
    errors = [(trial["error"] or {}).get("code") for trial in trials(api, made["id"])]
    assert errors[1:] == [DOES_NOT_FIT] * (len(errors) - 1)


def test_rows_of_evaluations_are_not_read_before_there_is_room_for_them(
    api: httpx.Client, settings: Settings, fake_ray: FakeRay, file_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def evaluate(*_: object) -> dict[str, str]:
        raise AssertionError

    sweep = body(file_id, evaluations={"words": SCORE})
    sweep["parameters"] = {BETA: {"values": [0.1]}}
    made = created(api, **sweep)
    with monkeypatch.context() as patch:
        patch.setattr("services.control_plane.evaluations.evaluations.MOST_LIVE", 0)
        patch.setattr("services.control_plane.sweeps.trials.evaluate", evaluate)
        train(settings, fake_ray, begun(api, made["id"], 0)["job_id"], [0.5])
        until(lambda: "evaluations that have not ended" in (look(api, made["id"])["waits_for"] or ""))
    assert ended(api, made["id"])["status"] == "succeeded"


@pytest.mark.parametrize("field", ["job", "values", "judge", "baseline"])
def test_a_model_that_a_sweep_needs_stays_until_the_sweep_has_ended(
    api: httpx.Client, settings: Settings, file_id: str, policy: str, field: str
) -> None:
    name = f"ft:tiny:raydpo::{field}"
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        columns, values = "id, project_id, source, root, job_id, num_outputs", "%s, 'proj_default', %s, 'tiny', %s, 0"
        row = (name, f"file:///nowhere/{field}", "ftjob-one")
        connection.execute(f"INSERT INTO models ({columns}) VALUES ({values})", row)
        sweep = body(file_id, max_running_jobs=1)
        if field == "job":
            sweep["job"]["model"] = name
        elif field == "values":
            sweep["parameters"] = {"model": {"values": ["tiny", name]}}
        else:
            judge = {"type": "model", "model": name} if field == "judge" else {"type": "length"}
            more = {"baseline": name if field == "baseline" else "tiny", "judge": judge}
            sweep["evaluations"] = {"better": SCORE | {"kind": "compare"} | more}
        made = created(api, **sweep)
        begun(api, made["id"], 0)
        connection.execute("UPDATE jobs SET observed = 'paused', desired = 'pause' WHERE observed = 'queued'")
        if field == "job":
            connection.execute("UPDATE jobs SET spec = spec || '{\"model\": \"tiny\"}' WHERE observed <> 'succeeded'")
    refused = api.delete(f"/models/{name}")
    assert (refused.status_code, f"is used by the sweep {made['id']}" in refused.text) == (400, True), refused.text
    api.post(f"/x/sweeps/{made['id']}/cancel")
    assert api.delete(f"/models/{name}").status_code == 200


def test_a_cancellation_is_told_as_that_of_the_key_that_sent_it(
    api: httpx.Client, base_url: str, settings: Settings, file_id: str
) -> None:
    made = created(api, **body(file_id))
    job_id = begun(api, made["id"], 0)["job_id"]
    key = new_key(api, scopes=EVERY_SCOPE)
    with api_of(base_url, key["value"]) as other:
        other.post(f"/x/sweeps/{made['id']}/cancel").raise_for_status()
    with psycopg.connect(settings.database_url) as connection:
        query = "SELECT count(*) FROM transitions WHERE job_id = %s AND actor = %s AND desired = 'cancel'"
        assert (connection.execute(query, (job_id, key["id"])).fetchone() or (0,))[0] > 0


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
    assert "has ended (cancelled)" in answer.json()["error"]["message"]


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
