"""Tests the way of a policy through its rounds: samples, rows, a job, evaluations, and when they end."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.errors import InvalidRequest
from services.control_plane.jobs.plans.plans import DOES_NOT_FIT
from services.control_plane.rounds import stages
from services.control_plane.rounds.selection import write_rows
from services.control_plane.rounds.stages import best_of, stage_of
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import FakeRay
from tests.services.control_plane.evaluations.conftest import POLICY, Engines, chats, until
from tests.services.control_plane.rounds.conftest import created, ended, look, reached

pytestmark = pytest.mark.usefixtures("policy")
Train = Callable[..., None]


def evaluation(api: httpx.Client, evaluation_id: str) -> dict[str, Any]:
    return dict(api.get(f"/x/evaluations/{evaluation_id}").json())


def name_of(job_id: str) -> str:
    return f"ft:tiny:raydpo::{job_id.removeprefix('ftjob-')}"


def test_two_rounds_train_each_policy_on_rows_of_the_one_before(
    api: httpx.Client, engines: Engines, train: Train
) -> None:
    made = created(api)
    assert (made["status"], made["model"], made["best_round"]) == ("running", POLICY, 0)
    models = [POLICY]
    for number in (1, 2):
        job_id = reached(api, made["id"], number, "job")
        engines.endings[name_of(job_id)] = " truly" * number  # the next policy writes longer answers
        job = api.get(f"/fine_tuning/jobs/{job_id}").json()
        assert (job["model"], job["metadata"]) == (models[-1], {"rounds": made["id"], "round": str(number)})
        assert job["x_raydpo"]["reference"]["model"] == POLICY
        train(job_id)
        models.append(reached(api, made["id"], number, "model"))
    found = ended(api, made["id"])
    assert (found["status"], found["end_reason"], found["best_round"], found["model"]) == (
        "succeeded",
        "num_rounds",
        2,
        models[-1],
    )
    assert [entry["score"]["value"] for entry in found["rounds"]] == [3, 4, 5]
    assert [entry["kl"] is None for entry in found["rounds"]] == [True, False, False]
    for number, entry in enumerate(found["rounds"][1:]):
        rows = [json.loads(line) for line in api.get(f"/files/{entry['file']}/content").text.splitlines()]
        assert len(rows) == entry["rows"]["num_rows"] == 12
        assert rows[3]["prompt"] == chats(4)[3]["prompt"]
        plain = f"good answer 3{' truly' * number}"
        assert rows[3]["chosen"] == [{"role": "assistant", "content": f"{plain} very very"}]
        assert rows[3]["rejected"] == [{"role": "assistant", "content": plain}]
        assert evaluation(api, entry["samples"])["model"] == models[number]
    seeds = {evaluation(api, entry["samples"])["request"]["sampling"]["seed"] for entry in found["rounds"][1:]}
    assert len(seeds) == 2


def test_rejection_sampling_tells_how_many_answers_it_tried_and_pairs_those_that_it_accepted(api: httpx.Client) -> None:
    """An answer that has a word less than the longest one is accepted with the probability exp(-1 / 0.01), so never.
    Each pass over the answers that are left accepts only the longest one, which is the last: 8 tries, and then 7."""
    made = created(api, num_samples=8, selection={"type": "rso", "beta": 0.01, "num_accepted": 2})
    file = reached(api, made["id"], 1, "file")
    told = look(api, made["id"])["rounds"][1]["rows"]
    assert (told["num_prompts"], told["num_answers"]) == (12, 12 * 8)
    assert (told["num_tried"], told["num_accepted"]) == (12 * (8 + 7), 12 * 2)
    assert (told["num_ties"], told["num_duplicates"], told["num_repeated_rows"], told["num_rows"]) == (0, 0, 0, 12)
    rows = [json.loads(line) for line in api.get(f"/files/{file}/content").text.splitlines()]
    longest = [f"good answer {number}{' very' * 7}" for number in range(12)]
    assert [row["chosen"][0]["content"] for row in rows] == longest
    assert [row["rejected"][0]["content"] for row in rows] == [text.removesuffix(" very") for text in longest]
    assert {(row["score_chosen"], row["score_rejected"]) for row in rows} == {(10, 9)}
    api.post(f"/x/rounds/{made['id']}/cancel")


def test_a_driver_that_is_killed_in_the_second_round_costs_an_attempt_of_its_job_and_nothing_else(
    api: httpx.Client, fake_ray: FakeRay, train: Train
) -> None:
    made = created(api)
    train(reached(api, made["id"], 1, "job"))
    job_id = reached(api, made["id"], 2, "job")
    until(lambda: f"{job_id}-1" in fake_ray.jobs)
    fake_ray.jobs[f"{job_id}-1"] = "FAILED"
    train(job_id, 2)
    found = ended(api, made["id"])
    assert (found["status"], found["end_reason"]) == ("succeeded", "num_rounds")
    assert found["rounds"][2]["model"] == name_of(job_id)
    jobs = api.get("/fine_tuning/jobs", params={"metadata[rounds]": made["id"]}).json()["data"]
    assert [job["id"] for job in jobs] == [job_id, found["rounds"][1]["job"]]  # no job more


def test_rounds_end_when_the_policy_is_no_longer_better(api: httpx.Client, train: Train) -> None:
    made = created(api, stop_if_not_better=True, num_rounds=5)
    train(reached(api, made["id"], 1, "job"))
    found = ended(api, made["id"])
    assert (found["end_reason"], len(found["rounds"]), found["best_round"], found["model"]) == (
        "not_better",
        2,
        0,
        POLICY,
    )


def test_a_judge_that_is_asked_compares_each_policy_with_the_one_before(
    api: httpx.Client, engines: Engines, train: Train
) -> None:
    made = created(api, judge={"type": "model", "model": "long"}, num_rounds=1)
    job_id = reached(api, made["id"], 1, "job")
    engines.endings[name_of(job_id)] = " truly"
    train(job_id)
    first, second = ended(api, made["id"])["rounds"]
    assert first["evaluations"] == {}
    assert (second["score"], second["win_rate"]["value"]) == (None, 1)
    assert evaluation(api, second["evaluations"]["quality"])["request"]["baseline"] == POLICY


def test_each_round_takes_the_next_prompts_and_the_first_ones_again_after_the_last(
    api: httpx.Client, train: Train
) -> None:
    made = created(api, rows=chats(15), prompts_per_round=12)
    for number in (1, 2):
        train(reached(api, made["id"], number, "job"))
    prompts = [
        [item["prompt"][0]["content"] for item in api.get(f"/x/evaluations/{entry['samples']}/items").json()["data"]]
        for entry in ended(api, made["id"])["rounds"][1:]
    ]
    assert prompts[0] == [f"Question {number}" for number in range(12)]
    assert prompts[1] == [f"Question {number % 15}" for number in range(12, 24)]


def test_too_few_rows_fail_the_first_round_and_end_a_later_one(api: httpx.Client, train: Train) -> None:
    found = ended(api, created(api, judge={"type": "regex", "pattern": "good"})["id"])
    assert (found["status"], found["error"]["code"]) == ("failed", "too_few_rows")
    assert "make 0 rows, but a job needs 10" in found["error"]["message"]
    assert found["rounds"][1]["rows"]["num_ties"] == 12
    assert found["rounds"][1]["file"] is None
    assert api.get(f"/x/evaluations/{found['rounds'][1]['samples']}/items").json()["data"]


def test_the_answers_of_a_policy_that_are_all_equal_end_a_later_round(
    api: httpx.Client, engines: Engines, train: Train
) -> None:
    made = created(api, judge={"type": "regex", "pattern": "very very$"}, num_rounds=3)
    job_id = reached(api, made["id"], 1, "job")
    engines.endings[name_of(job_id)] = " very very"
    train(job_id)
    found = ended(api, made["id"])
    assert (found["status"], found["end_reason"], found["best_round"]) == ("succeeded", "too_few_rows", 1)


def test_a_job_or_an_evaluation_that_does_not_succeed_fails_the_rounds(api: httpx.Client) -> None:
    made = created(api)
    job_id = reached(api, made["id"], 1, "job")
    api.post(f"/fine_tuning/jobs/{job_id}/cancel")
    found = ended(api, made["id"])
    assert (found["status"], found["error"]["code"]) == ("failed", "job_cancelled")
    assert f"Round 1, stage model: the job {job_id} did not succeed" in found["error"]["message"]
    other = created(api)
    api.post(f"/x/evaluations/{reached(api, other['id'], 0, 'evaluations')['quality']}/cancel")
    found = ended(api, other["id"])
    assert (found["status"], found["error"]["code"]) == ("failed", "evaluation_cancelled")


def test_rounds_wait_while_the_project_may_have_no_more_jobs_or_evaluations(
    api: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("services.control_plane.evaluations.evaluations.MOST_LIVE", 0)
        made = created(api)
        assert "evaluations that have not ended" in until(lambda: look(api, made["id"])["waits_for"])
    reached(api, made["id"], 1, "job")
    api.post(f"/x/rounds/{made['id']}/cancel")


def test_rounds_wait_while_no_machine_that_the_job_fits_is_there(
    api: httpx.Client, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object) -> None:
        raise InvalidRequest("The job cannot fit.", code=DOES_NOT_FIT)

    with monkeypatch.context() as patch:
        made = created(api)  # is not refused itself
        patch.setattr(stages.plans, "refuse_hopeless", refuse)
        told = "The job cannot fit. After 7 days of this, the rounds fail."
        assert until(lambda: look(api, made["id"])["waits_for"] == told)
        with psycopg.connect(settings.database_url, autocommit=True) as connection:
            since = "SELECT misfit_since, misfit_seen_at IS NULL FROM rounds WHERE id = %s"
            api.post(f"/x/rounds/{made['id']}/pause")
            assert connection.execute(since, [made["id"]]).fetchone() == (None, False)  # a pause is a break
            api.post(f"/x/rounds/{made['id']}/resume")
            assert until(lambda: look(api, made["id"])["waits_for"] == told)
            not_looked_at = "misfit_since = now() - interval '8 days', misfit_seen_at = now() - interval '8 days'"
            connection.execute(f"UPDATE rounds SET {not_looked_at} WHERE id = %s", [made["id"]])
            recent = "SELECT misfit_since > now() - interval '1 hour' FROM rounds WHERE id = %s"
            assert until(lambda: connection.execute(recent, [made["id"]]).fetchone() == (True,))
    reached(api, made["id"], 1, "job")
    api.post(f"/x/rounds/{made['id']}/cancel")


def test_rounds_whose_job_has_not_fit_for_a_week_fail(
    api: httpx.Client, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object) -> None:
        raise InvalidRequest("The job cannot fit.", code=DOES_NOT_FIT)

    with monkeypatch.context() as patch:
        made = created(api)
        patch.setattr(stages.plans, "refuse_hopeless", refuse)
        assert until(lambda: "cannot fit" in (look(api, made["id"])["waits_for"] or ""))
        with psycopg.connect(settings.database_url) as connection:
            begun_at = "UPDATE rounds SET misfit_since = misfit_since - interval '8 days' WHERE id = %s"
            connection.execute(begun_at, [made["id"]])
        found = ended(api, made["id"])
    assert (found["status"], found["error"]["code"]) == ("failed", DOES_NOT_FIT)


def test_few_failed_items_are_counted_and_many_fail_the_rounds(
    api: httpx.Client, engines: Engines, train: Train
) -> None:
    engines.refusing = {"Question 11"}  # one of twelve
    made = created(api, num_rounds=1, evaluation={})
    assert reached(api, made["id"], 1, "rows")["num_failed"] == 1
    train(reached(api, made["id"], 1, "job"))
    assert [entry["num_failed"] for entry in ended(api, made["id"])["rounds"]] == [1, 2]  # of quality and drift
    engines.refusing = {"Question 1"}  # and 10 and 11
    found = ended(api, created(api, evaluation={})["id"])
    assert (found["status"], found["error"]["code"]) == ("failed", "evaluation_incomplete")
    assert "3 of 12 failed, and at most 10% may. The first one: " in found["error"]["message"]


def test_rows_are_written_off_the_event_loop_and_not_again_before_there_is_room(
    api: httpx.Client, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, reserved = [], []

    def write(*given: Any) -> dict[str, int]:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        written.append(given)
        return write_rows(*given)

    async def reserve(session: AsyncSession, project_id: str, num_bytes: int, *, param: str) -> None:
        reserved.append(num_bytes)
        await reserving(session, project_id, num_bytes, param=param)

    reserving = stages.files.reserve
    monkeypatch.setattr(stages, "write_rows", write)
    monkeypatch.setattr(stages.files, "reserve", reserve)
    limit = "UPDATE projects SET max_bytes = %s WHERE id = 'proj_default'"
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        (used,) = connection.execute("SELECT coalesce(sum(num_bytes), 0) FROM files").fetchone() or (0,)
        connection.execute(limit, (used + 100,))
        try:
            made = created(api)
            until(lambda: len(reserved) > 4)
        finally:
            connection.execute(limit, (None,))
    assert (len(written), reserved[0], min(reserved[1:]) > 100) == (1, 1, True)
    reached(api, made["id"], 1, "job")
    api.post(f"/x/rounds/{made['id']}/cancel")


def done(number: int, **results: float) -> dict[str, Any]:
    told = {name: {"value": value} for name, value in results.items()}
    return {"number": number, "model": f"m{number}", "results": {"score": None, "win_rate": None, **told}}


@pytest.mark.parametrize(
    ("history", "best"),
    [
        ([{"number": 0, "model": "m0"}], 0),
        ([done(0, score=0.5), done(1, score=0.7), done(2, score=0.7), done(3, score=0.6)], 1),
        ([done(0, score=0.5), done(1, score=0.4), {"number": 2}], 0),
        ([done(0), done(1, win_rate=0.6), done(2, win_rate=0.5)], 1),
        ([done(0), done(1, win_rate=0.4), done(2, win_rate=0.9)], 0),
    ],
)
def test_the_best_policy_has_the_highest_score_or_won_against_those_before(
    history: list[dict[str, Any]], best: int
) -> None:
    assert best_of(history)["number"] == best


def test_a_round_is_at_the_first_stage_that_has_left_nothing() -> None:
    assert stage_of({"number": 0, "model": "m"}) == "evaluations"
    assert stage_of({"number": 1}) == "samples"
    assert stage_of({"number": 1, "samples": "e", "rows": {}, "file": "f"}) == "job"
    assert stage_of({"number": 0, "model": "m", "evaluations": {}, "results": {}}) == "next"
