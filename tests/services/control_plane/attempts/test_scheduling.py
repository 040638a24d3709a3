"""Tests which waiting job starts first, and what the others are told."""

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_core.config import Lora, TrainConfig
from services.contract import JobSpec, Weights
from services.control_plane.attempts.scheduling import Misfit, Resources, needs, reference_model, what_each_waits_for
from services.control_plane.core.tables import Job
from services.control_plane.models.deployments.eviction import NO_ENGINES, Engines
from services.control_plane.settings import Settings
from services.control_plane.tenants.quotas import Share

FEWER = "Submit it with fewer workers (num_workers)"
FOUR_GPUS = {"CPU": 64, "GPU": 4}
START = datetime(2026, 1, 1, tzinfo=UTC)


def job(number: int, **values: Any) -> Job:
    workers = values.pop("workers", 1)
    given = {"project_id": "a", "priority": 0, "observed": "queued", "desired": "run"} | values
    return Job(id=f"job-{number}", created_at=START + timedelta(seconds=number), spec={"num_workers": workers}, **given)


@pytest.fixture(scope="module")
def several(offline: Settings) -> Settings:
    return offline.model_copy(update={"max_running_jobs": 3, "num_gpus_per_worker": 1.0})


def starting(waits: dict[str, str | None]) -> list[str]:
    return [job_id for job_id, what in waits.items() if what is None]


def test_the_highest_priority_goes_first_then_the_oldest(offline: Settings) -> None:
    waits = what_each_waits_for([job(1), job(2, priority=1), job(3, priority=1)], {}, {"CPU": 8}, offline)
    assert waits == {"job-2": None} | dict.fromkeys(
        ("job-3", "job-1"), "another job to end, because at most 1 may run at once (setting max_running_jobs)"
    )


def test_a_large_job_keeps_its_place_and_one_that_never_fits_keeps_nobody(several: Settings) -> None:
    live = [job(1, workers=2, observed="running"), job(2, workers=9), job(3, workers=3), job(4)]
    waits = what_each_waits_for(live, {}, {"CPU": 64, "GPU": 4}, several)
    assert waits == {
        "job-2": "a larger cluster, because the job needs 9 GPU but the cluster has 4",
        "job-3": "running jobs to end, because together with them the job needs 5 GPU but the cluster has 4",
        "job-4": "its turn, because job-3 goes first",
    }


@pytest.mark.parametrize(
    ("workers", "cluster", "engines", "remedy"),
    [
        (
            9,
            FOUR_GPUS,
            NO_ENGINES,
            "Submit it with fewer workers (num_workers), or ask the operator for a larger cluster.",
        ),
        (9, {"CPU": 64, "GPU": 0}, NO_ENGINES, "Ask the operator for a larger cluster."),
        (1, {"CPU": 0, "GPU": 4}, NO_ENGINES, "Ask the operator for a larger cluster."),
        (1, FOUR_GPUS, Engines(pinned_gpus=4.0), "Ask the operator to pin fewer models, or for a larger cluster."),
        (
            2,
            FOUR_GPUS,
            Engines(pinned_gpus=3.0),
            f"{FEWER}, or ask the operator to pin fewer models, or for a larger cluster.",
        ),
    ],
)
def test_a_job_is_advised_what_would_make_it_fit(
    several: Settings, workers: int, cluster: Resources, engines: Engines, remedy: str
) -> None:
    waits = what_each_waits_for([job(1, workers=workers)], {}, cluster, several, engines=engines)["job-1"]
    assert isinstance(waits, Misfit)
    assert waits.remedy == remedy


def test_a_job_on_an_nf4_base_waits_for_no_engine() -> None:
    weights = Weights(adapter=Lora(), quantization="nf4")
    spec = JobSpec(model="tiny", training_file="file-1", config=TrainConfig(), weights=weights)
    nf4, plain = (
        Job(id="job", model_source="/m", model_root="tiny", created_at=START, spec=each.model_dump(mode="json"))
        for each in (spec, spec.model_copy(update={"weights": Weights(adapter=Lora())}))
    )
    assert reference_model(nf4) is None
    assert reference_model(plain) is not None


def test_a_project_at_its_limit_keeps_no_other_project(several: Settings) -> None:
    live = [job(1, observed="running"), job(2), job(3, project_id="b")]
    waits = what_each_waits_for(live, {"a": Share(1), "b": Share()}, {"CPU": 64, "GPU": 4}, several)
    assert waits == {
        "job-2": (
            "another job of its project to end, because at most 1 may run at once (max_running_jobs of the project)"
        ),
        "job-3": None,
    }


def test_a_job_that_comes_back_from_a_long_rest_takes_its_turn_again(offline: Settings) -> None:
    live = [job(1, observed="running"), job(2), job(3, observed="running")]
    others = "another job to end, because at most 1 may run at once (setting max_running_jobs)"
    assert what_each_waits_for(live, {}, {"CPU": 8}, offline, {"job-1"}) == {"job-1": others, "job-2": others}
    assert what_each_waits_for(live[:2], {}, {"CPU": 8}, offline, {"job-1"}) == {"job-1": None, "job-2": others}
    live[0].desired = "cancel"
    assert what_each_waits_for(live[:2], {}, {"CPU": 8}, offline, {"job-1"}) == {"job-2": None}


def test_priority_is_within_a_project_and_projects_take_turns(several: Settings) -> None:
    live = [job(number, priority=10) for number in range(5)] + [job(9, project_id="b"), job(8, project_id="b")]
    waits = what_each_waits_for(live, {}, {"CPU": 64, "GPU": 64}, several)
    assert starting(waits) == ["job-0", "job-8", "job-1"]


def test_of_one_place_the_project_gets_it_that_used_the_least_for_its_weight(offline: Settings) -> None:
    live = [job(1), job(2, project_id="b"), job(3, project_id="c")]
    shares = {"a": Share(worker_hours=10), "b": Share(worker_hours=4), "c": Share(worker_hours=6, weight=2)}
    assert starting(what_each_waits_for(live, shares, {}, offline)) == ["job-3"]
    assert starting(what_each_waits_for(live, {}, {}, offline)) == ["job-1"]


def test_running_workers_are_shared_by_weight(several: Settings) -> None:
    live = [job(number, project_id="ab"[number % 2]) for number in range(60)]
    wide = several.model_copy(update={"max_running_jobs": 12})
    waits = what_each_waits_for(live, {"a": Share(weight=2), "b": Share(weight=1)}, {}, wide)
    assert Counter(int(name[4:]) % 2 for name in starting(waits)) == {0: 8, 1: 4}


def test_a_job_of_another_project_that_goes_first_is_not_named(several: Settings) -> None:
    live = [job(1, workers=3, project_id="b", observed="running"), job(2, workers=2), job(3), job(4, project_id="b")]
    waits = what_each_waits_for(live, {}, {"CPU": 64, "GPU": 4}, several)
    assert waits["job-3"] == "its turn, because job-2 goes first"
    assert waits["job-4"] == "its turn, because a job of another project goes first"


def test_where_ray_does_not_say_what_it_has_jobs_start(several: Settings) -> None:
    assert starting(what_each_waits_for([job(1, workers=100)], {}, {}, several)) == ["job-1"]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 6), st.integers(-2, 2), st.booleans()), max_size=20),
    st.integers(1, 8),
)
def test_no_limit_is_ever_exceeded_and_every_queued_job_is_answered(
    several: Settings, jobs: list[tuple[str, int, int, bool]], gpus: int
) -> None:
    live = [
        job(i, project_id=project, workers=workers, priority=priority, observed="running" if runs else "queued")
        for i, (project, workers, priority, runs) in enumerate(jobs)
    ]
    limits = {"a": 1, "b": 2, "c": None}
    shares = {project: Share(limit) for project, limit in limits.items()}
    waits = what_each_waits_for(live, shares, {"CPU": 99, "GPU": gpus}, several)
    assert waits.keys() == {each.id for each in live if each.observed == "queued"}
    started = [each for each in live if each.id in starting(waits)]
    running = [each for each in live if each.observed == "running"]
    if started:
        assert len(running + started) <= several.max_running_jobs
        assert sum(needs(each, several)["GPU"] for each in running + started) <= gpus
    for project, limit in limits.items():
        own = [each for each in running + started if each.project_id == project]
        assert limit is None or len(own) <= max(limit, sum(each in running for each in own))
