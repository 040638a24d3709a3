"""Tests the metrics of a job's steps, returned as columns."""

import asyncio
import time
from statistics import fmean
from typing import Any

import httpx
import openai
import pytest

from services.contract import JobEvent, StepMetrics
from services.control_plane.attempts import attempts
from services.control_plane.core.store import Store
from services.control_plane.progress import metrics
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import API_KEY, pairs
from tests.services.control_plane.steps import (
    counted,
    end_job,
    insert_job,
    insert_steps,
    metrics_of_step,
    pack_all,
)

STEPS = 25


@pytest.fixture(scope="module")
def job_id(client: openai.OpenAI, settings: Settings) -> str:
    """Creates a job of 25 steps, whose losses are the numbers of the steps. Every tenth step is evaluated."""
    file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method={"type": "dpo"}).id
    steps = [
        StepMetrics(
            step=step,
            total_steps=STEPS,
            metrics={"loss": float(step)} | ({"eval/loss": 100.0 + step} if step % 10 == 0 else {}),
        )
        for step in range(1, STEPS + 1)
    ]
    events = [JobEvent(seq=i, created_at=time.time(), report=report) for i, report in enumerate(steps)]

    async def write() -> None:
        store = Store(settings.database_url)
        async with store.begin() as session:
            await attempts.begin(session, job, 1, None, num_accelerators=0)
            await attempts.record(session, job, 1, events, settings, posted=True)
        await store.close()

    asyncio.run(write())
    return job


def ask(base_url: str, job_id: str, **query: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {API_KEY}"}
    return httpx.get(f"{base_url}/v1/x/jobs/{job_id}/metrics", params=query, headers=headers, trust_env=False)


def test_every_step_is_a_point_where_there_is_room(base_url: str, job_id: str) -> None:
    found = ask(base_url, job_id).json()
    assert (found["object"], found["job_id"], found["bucket_steps"]) == ("fine_tuning.job.metrics", job_id, 1)
    assert found["steps"] == list(range(1, STEPS + 1))
    numbers = [float(step) for step in found["steps"]]
    assert found["metrics"]["train_loss"] == dict.fromkeys(("mean", "min", "max", "last"), numbers)
    evaluated = found["metrics"]["full_valid_loss"]["last"]
    assert [number for number in evaluated if number is not None] == [110.0, 120.0]
    assert evaluated[9] == 110.0


def test_buckets_hold_mean_least_most_and_last(base_url: str, job_id: str) -> None:
    found = ask(base_url, job_id, resolution=3).json()
    assert (found["bucket_steps"], found["steps"]) == (9, [9, 18, 25])
    assert found["metrics"]["train_loss"] == {
        "mean": [5.0, 14.0, 22.0],
        "min": [1.0, 10.0, 19.0],
        "max": [9.0, 18.0, 25.0],
        "last": [9.0, 18.0, 25.0],
    }
    assert found["metrics"]["full_valid_loss"]["last"] == [None, 110.0, 120.0]


def test_from_and_to_are_steps_and_included(base_url: str, job_id: str) -> None:
    assert ask(base_url, job_id, **{"from": 5, "to": 7}).json()["steps"] == [5, 6, 7]
    assert ask(base_url, job_id, **{"from": 24, "to": 90}).json()["steps"] == [24, 25]
    beyond = ask(base_url, job_id, **{"from": 26}).json()
    assert (beyond["steps"], beyond["metrics"]) == ([], {})


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"from": 0}, "from"),
        ({"from": 5, "to": 4}, "to"),
        ({"to": "soon"}, "to"),
        ({"resolution": 0}, "resolution"),
        ({"resolution": 10_001}, "resolution"),
        ({"buckets": 5}, "buckets"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(base_url: str, job_id: str, query: dict[str, Any], param: str) -> None:
    answer = ask(base_url, job_id, **query)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_job_that_is_not_there_has_no_metrics(base_url: str, client: openai.OpenAI) -> None:
    assert ask(base_url, "ftjob-no").status_code == 404


LONG = 4321


@pytest.fixture(scope="module")
def long_job_id(base_url: str, settings: Settings) -> str:
    """Writes a job of 4,321 steps without step 1234. Most of its steps are in blocks, the newest are rows."""
    job_id = insert_job(settings.database_url, "ftjob-long")
    insert_steps(settings.database_url, job_id, (step for step in range(1, LONG + 1) if step != 1234))
    return job_id


def expected(first: int, last: int, start: int, width: int) -> dict[str, Any]:
    """Computes the answer for the long job, with buckets from `start` of `width` steps, from its metrics."""
    buckets: dict[int, list[int]] = {}
    for step in range(first, min(last, LONG) + 1):
        if step != 1234:
            buckets.setdefault((step - start) // width, []).append(step)
    names = sorted(metrics_of_step(10))
    columns: dict[str, Any] = {name: {"mean": [], "min": [], "max": [], "last": []} for name in names}
    for steps in buckets.values():
        for name in names:
            known = [metrics_of_step(step)[name] for step in steps if name in metrics_of_step(step)]
            columns[name]["mean"].append(pytest.approx(fmean(known)) if known else None)
            columns[name]["min"].append(min(known, default=None))
            columns[name]["max"].append(max(known, default=None))
            columns[name]["last"].append(known[-1] if known else None)
    return {"bucket_steps": width, "steps": [steps[-1] for steps in buckets.values()], "metrics": columns}


def test_metrics_are_the_same_when_steps_are_in_blocks(
    base_url: str, settings: Settings, long_job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of long ranges only the sums are read, of which each has a hundred steps; ranges may begin and end anywhere."""

    def told(**query: int) -> dict[str, Any]:
        found = ask(base_url, long_job_id, **{name.strip("_"): value for name, value in query.items()}).json()
        return {name: found[name] for name in ("bucket_steps", "steps", "metrics")}

    for number, rows_and_blocks in enumerate([(4320, 0), (1321, 3), (0, 5)]):
        if number == 2:
            end_job(settings.database_url, long_job_id)
        if number:
            pack_all(settings.database_url)
        assert counted(settings.database_url, long_job_id) == rows_and_blocks
        monkeypatch.setattr(metrics, "MOST_READ", 50_000)
        assert told() == expected(1, LONG, 1, 5)
        assert told(from_=950, to=1250, resolution=100) == expected(950, 1250, 950, 4)
        monkeypatch.setattr(metrics, "MOST_READ", 1_000)
        assert told() == expected(1, LONG, 1, 100)
        assert told(resolution=10) == expected(1, LONG, 1, 500)
        assert told(from_=950, to=3333, resolution=10) == expected(950, 3333, 901, 300)
        assert told(from_=950, to=1250) == expected(950, 1250, 950, 1)
