"""Tests that jobs, their reference models and the models of requests all get their turns in a simulated day.

The day has a clock of its own. In each tick, the real functions decide which jobs start and which models are loaded.
"""

import random
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from services.control_plane.attempts.scheduling import FOR_MODELS, needs, reference_model, what_each_waits_for
from services.control_plane.core.tables import Job
from services.control_plane.models.deployments.eviction import Model, Plan, Room, decide, engines
from services.control_plane.settings import Settings

TICK_SECONDS = 10.0
LOADING_SECONDS = 90.0
REFERENCE_SECONDS = 1200.0  # most that an attempt may wait for its reference; it dies after an hour
WORKERS_SECONDS = 1800.0  # Ray Train waits for no longer than this for the GPUs of workers
MOST_SECONDS = {"encoding": 120.0, "scoring": 7200.0, "training": 1200.0}
# No job is stopped for others, so a request, or the job that is next, may wait for the longest job and some turns.
TURN_SECONDS = sum(MOST_SECONDS.values()) + 3600.0


def new_job(number: int, model: str, **spec: Any) -> Job:
    spec = {"model": model, "training_file": "f", "config": {}} | spec
    given = {"project_id": "ab"[number % 2], "priority": 0, "observed": "queued", "desired": "run"}
    at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=number)
    return Job(id=f"job-{number}", created_at=at, spec=spec, model_source=f"/{model}", model_root=model, **given)


def engine_of(job: Job) -> str | None:
    """Returns the name of the engine that scores the job's reference. Returns None if there is nothing to score."""
    reference = reference_model(job)
    return reference.app_name if reference else None


@dataclass
class Engine:
    """The state of a model, and the requests for it."""

    pinned: bool = False
    idle_seconds: float | None = None
    is_requested: bool = False
    for_jobs: bool = True
    asked_at: float = 0.0
    used_at: float = 0.0
    state: str = "waiting"
    since: float = 0.0  # it is loading, or running
    has_gpu: bool = False
    answered: bool = False
    loads: int = 0  # since it last answered or scored
    waiting: list[float] = field(default_factory=list)  # when each client first asked
    answers: list[float] = field(default_factory=list)  # when each answer ends

    def request(self, now: float, *, for_job: bool) -> None:
        if not self.is_requested:
            self.is_requested, self.asked_at = True, now
        self.for_jobs, self.used_at = self.for_jobs and for_job, now

    def forgotten(self) -> "Engine":
        kept = {"pinned": self.pinned, "idle_seconds": self.idle_seconds, "loads": self.loads, "waiting": self.waiting}
        return Engine(**kept)  # type: ignore[arg-type]


@dataclass
class Run:
    """A job, its current stage, and how long its stages take."""

    job: Job
    came: float
    gpus: float
    seconds: dict[str, float]
    engine: str | None  # which scores its reference
    stage: str = "queued"
    since: float = 0.0

    @property
    def holds_engine(self) -> bool:
        """Whether the job needs its reference's engine. A job that leaves the choice to the service needs it later."""
        insists = self.stage == "encoding" and self.job.spec["reference_source"] == "serve"
        return self.engine is not None and (insists or self.stage in ("awaiting", "scoring"))


class Day:
    """Simulates clients that ask until they are answered, and jobs of one to four GPUs.

    A job encodes its file, scores it with its reference, waits for the GPUs of its workers, and trains. An engine gets
    its GPU when neither workers nor other engines use the GPU.
    """

    def __init__(self, settings: Settings, seed: int, *, gpus: int, places: int, num_models: int, busy: float) -> None:
        limits = {"max_loaded_models": places, "max_running_jobs": 8}
        self.settings = settings.model_copy(update=limits | {"num_gpus_per_worker": 1.0, "num_gpus_per_model": 1.0})
        self.random, self.gpus, self.busy = random.Random(seed), gpus, busy
        self.models = {f"m{number}": engine_of(new_job(0, f"m{number}")) or "" for number in range(num_models)}
        self.engines = {name: Engine() for name in self.models.values()}
        self.engines[self.models[f"m{num_models - 1}"]].idle_seconds = 600.0
        self.engines[self.models["m1"]].pinned = gpus > 2
        self.queue, self.running, self.num_jobs, self.num_scored = list[Run](), list[Run](), 0, 0
        self.longest = {"request": 0.0, "job": 0.0, "awaiting": 0.0, "workers": 0.0}
        self.now, self.last_job = 0.0, float("-inf")

    # --- what the control plane sees and does ---------------------------------------------------------------

    def tick(self) -> None:
        self.come()
        for run in list(self.running):
            self.go_on(run)
        cluster = {"CPU": 64.0, "GPU": float(self.gpus)}
        used = engines(self.seen(), 0, self.room([]), capacity=cluster["GPU"], since_last_job=self.now - self.last_job)
        live = [run.job for run in [*self.running, *self.queue]]
        waits = what_each_waits_for(live, {}, cluster, self.settings, engines=used)
        for run in [run for run in self.queue if waits[run.job.id] is None]:
            self.start(run)
        plan = decide(self.seen(), self.room([run for run in self.queue if waits[run.job.id] == FOR_MODELS]))
        self.serve(plan)
        self.answer(plan.waits)
        self.now += TICK_SECONDS

    def room(self, next_job: Collection[Run]) -> Room:
        gpus = [sum(needs(run.job, self.settings)["GPU"] for run in runs) for runs in (self.running, next_job)]
        places = self.settings.max_loaded_models
        return Room(places=places, gpus=self.gpus - gpus[0], gpus_of_next_job=gpus[1], wait_seconds=180)

    def references(self) -> set[str | None]:
        return {run.engine for run in self.running if run.holds_engine}

    def seen(self) -> list[Model]:
        references, found = self.references(), []
        for name, engine in self.engines.items():
            if not engine.is_requested and not engine.pinned:
                continue
            since, asked, used = self.now - engine.since, self.now - engine.asked_at, self.now - engine.used_at
            model = Model(app_name=name, state=engine.state, held=since, asked=asked, used=used, gpus=1.0)  # type: ignore[arg-type]
            bits = {"is_reference": name in references, "pinned": engine.pinned, "for_jobs": engine.for_jobs}
            bits |= {"answers": bool(engine.answers), "answered": engine.answered}
            found.append(replace(model, **bits, idle_seconds=engine.idle_seconds))  # type: ignore[arg-type]
        return found

    def serve(self, plan: Plan) -> None:
        references = self.references()
        for name, engine in self.engines.items():
            engine.answers = [ends for ends in engine.answers if ends > self.now]
            if name in plan.forget:
                assert not engine.answers
                assert not engine.pinned
                assert name not in references
                engine = self.engines[name] = engine.forgotten()
            elif name in plan.serve and engine.state == "waiting":
                engine.state, engine.since = "loading", self.now
                engine.loads += 1
                assert engine.loads <= 2, "loaded again and again without answering"
            elif engine.state == "loading":
                engine.answered |= name in references
                if engine.has_gpu and self.now - engine.since > LOADING_SECONDS:
                    engine.state, engine.since = "running", self.now
            if engine.state == "loading" and not engine.has_gpu and self.free() >= 1:
                engine.has_gpu, engine.since = True, self.now
        assert sum(engine.state != "waiting" for engine in self.engines.values()) <= self.settings.max_loaded_models

    # --- what happens around it ------------------------------------------------------------------------------

    def free(self) -> float:
        trains = sum(run.gpus for run in self.running if run.stage == "training")
        return self.gpus - trains - sum(engine.has_gpu for engine in self.engines.values())

    def come(self) -> None:
        for model, name in self.models.items():
            if self.random.random() < (self.busy if model in ("m0", "m1") else 0.02):
                self.engines[name].waiting.append(self.now)
        if self.random.random() < 0.006:
            self.num_jobs += 1
            workers, source = self.random.randint(1, self.gpus), self.random.choice(["serve", "auto", "trainer"])
            model = self.random.choice([*self.models, "other"])
            job = new_job(self.num_jobs, model, num_workers=workers, reference_source=source)
            large = 1.0 if self.random.random() < 0.2 else 0.1
            most = MOST_SECONDS | {"scoring": large * MOST_SECONDS["scoring"]}
            seconds = {stage: self.random.uniform(10, seconds) for stage, seconds in most.items()}
            self.queue.append(Run(job, self.now, workers, seconds, engine_of(job)))

    def start(self, run: Run) -> None:
        self.longest["job"] = max(self.longest["job"], self.now - max(run.came, self.last_job))
        self.queue.remove(run)
        self.running.append(run)
        run.job.observed, self.last_job = "running", self.now
        self.move(run, "encoding")

    def move(self, run: Run, stage: str) -> None:
        if run.stage in self.longest:
            self.longest[run.stage] = max(self.longest[run.stage], self.now - run.since)
        held = run.holds_engine
        run.stage, run.since = stage, self.now
        if run.holds_engine and not held and run.engine:
            self.engines.setdefault(run.engine, Engine()).request(self.now, for_job=True)

    def go_on(self, run: Run) -> None:
        is_over = self.now - run.since > run.seconds.get(run.stage, 0.0)
        if run.stage == "encoding" and is_over:
            self.move(run, "awaiting" if run.engine else "workers")
        elif run.stage == "awaiting" and run.engine and self.engines[run.engine].state == "running":
            self.engines[run.engine].loads, self.engines[run.engine].answered = 0, True
            self.move(run, "scoring")
        elif run.stage == "scoring" and is_over:
            self.num_scored += 1
            self.move(run, "workers")
        elif run.stage == "workers" and self.free() >= run.gpus:
            self.move(run, "training")
            run.job.training = {"total_steps": 1}
        elif run.stage == "training" and is_over:
            self.running.remove(run)
        assert run.stage != "awaiting" or self.now - run.since < REFERENCE_SECONDS, "a reference has no place"
        assert run.stage != "workers" or self.now - run.since < WORKERS_SECONDS, "workers have no GPUs"

    def answer(self, closed: Collection[str]) -> None:
        for name in self.models.values():
            engine = self.engines[name]
            if not engine.waiting:
                continue
            engine.request(self.now, for_job=False)
            if engine.state == "running" and name not in closed:
                self.longest["request"] = max(self.longest["request"], self.now - min(engine.waiting))
                engine.answers += [self.now + self.random.uniform(1, 120) for _ in engine.waiting]
                engine.waiting, engine.answered, engine.loads = [], True, 0


@pytest.mark.slow
@pytest.mark.parametrize(("gpus", "places", "num_models"), [(1, 2, 2), (2, 2, 3), (4, 2, 5)])
@pytest.mark.parametrize("busy", [0.04, 0.9])  # 0.9: two models are never idle by themselves
def test_nobody_starves_and_no_job_dies_of_waiting(
    offline: Settings, gpus: int, places: int, num_models: int, busy: float
) -> None:
    day = Day(offline, gpus + places, gpus=gpus, places=places, num_models=num_models, busy=busy)
    while day.now < 86400:
        day.tick()
    waiting = [since for engine in day.engines.values() for since in engine.waiting]
    waiting += [max(run.came, day.last_job) for run in day.queue]
    assert day.now - min(waiting, default=day.now) < TURN_SECONDS
    assert max(day.longest["request"], day.longest["job"]) < TURN_SECONDS  # of a job: since it is the next one
    assert day.num_jobs - len(day.queue) - len(day.running) >= 20
    assert day.num_scored >= 10
