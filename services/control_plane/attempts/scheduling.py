"""Which queued jobs may start now, and what the others wait for.

Projects take turns: the one whose running workers are the fewest for its weight goes first, then the one whose workers
ran the shortest time in the last day for its weight, then the one whose next job is the oldest. Within a project the
highest priority goes first, then the oldest job.

A job that waits for room keeps its place, so that smaller ones behind it cannot starve it. One that waits for its
project's limit, or for a larger cluster, keeps nobody.

On GPUs jobs and models take turns, too. A job's reference takes the GPUs of its workers, which begin after it. A job
that waits for models keeps its place, and idle ones leave for it; a model that has waited since before the last job
began goes before the next one.

A running job that waits for its next attempt for long holds nothing meanwhile, and then takes its turn again.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from services.contract import JobSpec
from services.control_plane.core.tables import Job
from services.control_plane.models.models import reference_of
from services.control_plane.models.places import NO_ENGINES, Engines
from services.control_plane.settings import Settings
from services.control_plane.tenants.quotas import Share

Resources = Mapping[str, float]  # by Ray's names: CPU, GPU
FOR_MODELS = "loaded models to leave the GPUs that it needs"
FOR_MODELS_TURN = "its turn: a model that waits for GPUs goes first"


def what_each_waits_for(
    live: Sequence[Job],
    shares: Mapping[str, Share],
    capacity: Resources,
    settings: Settings,
    back: Collection[str] = (),
    engines: Engines = NO_ENGINES,
) -> dict[str, str | None]:
    """For each queued job: None if it may start now. `shares` are the projects'; `back` take their turn again."""
    running = [job for job in live if job.observed == "running" and job.id not in back]
    per_project = Counter(job.project_id for job in running)
    held = sum((Counter(needs(job, settings)) for job in running), Counter[str]())
    references = {name for job in running if (name := _reference(job))}
    num_running, first = len(running), None
    waits: dict[str, str | None] = {}
    waiting = [job for job in live if job.desired == "run" and (job.observed == "queued" or job.id in back)]
    turns = _Turns(running, waiting, shares)
    for job in turns:
        needed, limit = needs(job, settings), shares.get(job.project_id, Share()).max_running_jobs
        if limit is not None and per_project[job.project_id] >= limit:
            waits[job.id] = f"another job of its project to end: {limit} may run at once"
        elif short := _beyond(needed, capacity):
            waits[job.id] = f"a larger cluster: it needs {short}"
        elif num_running >= settings.max_running_jobs:
            waits[job.id] = f"another job to end: {settings.max_running_jobs} may run at once"
        elif first is not None:
            goes_first = first.id if first.project_id == job.project_id else "a job of another project"
            waits[job.id] = f"its turn: {goes_first} goes first"
        elif short := _beyond(Counter(needed) + held, capacity):
            first, waits[job.id] = job, f"running jobs to end: with them it needs {short}"
        elif (reference := _reference(job)) and len(references | {reference}) > settings.max_loaded_models:
            first, most = job, settings.max_loaded_models
            waits[job.id] = f"a place for its reference: those of running jobs hold all {most} places for models"
        elif needed.get("GPU") and engines.go_first:
            first, waits[job.id] = job, FOR_MODELS_TURN
        elif needed.get("GPU") and _beyond(Counter(needed) + held + Counter({"GPU": engines.gpus}), capacity):
            first, waits[job.id] = job, FOR_MODELS
        else:
            waits[job.id] = None
            references |= {reference} if reference else set()
            held += Counter(needed)
            per_project[job.project_id] += 1
            num_running += 1
            turns.start(job)
    return waits


class _Turns:
    """The waiting jobs in the order in which they may start, which changes as they do."""

    def __init__(self, running: Sequence[Job], waiting: Sequence[Job], shares: Mapping[str, Share]) -> None:
        self._shares = shares
        self._workers: Counter[str] = Counter()  # that run, by project
        self._queues: defaultdict[str, list[Job]] = defaultdict(list)
        for job in running:
            self.start(job)
        for job in waiting:
            self._queues[job.project_id].append(job)
        for queue in self._queues.values():
            queue.sort(key=lambda job: (-job.priority, job.created_at, job.id))

    def __iter__(self) -> Iterator[Job]:
        """A project's place is found again after each of its jobs: only these change it."""
        heap = [self._place(project_id, 0) for project_id in self._queues]
        heapq.heapify(heap)
        while heap:
            *_, project_id, number = heap[0]
            yield self._queues[project_id][number]
            if number + 1 < len(self._queues[project_id]):
                heapq.heapreplace(heap, self._place(project_id, number + 1))
            else:
                heapq.heappop(heap)

    def start(self, job: Job) -> None:
        self._workers[job.project_id] += job.spec.get("num_workers", 1)

    def _place(self, project_id: str, number: int) -> tuple[Any, ...]:
        share, job = self._shares.get(project_id, Share()), self._queues[project_id][number]
        used = (self._workers[project_id] / share.weight, share.worker_hours / share.weight)
        return (*used, job.created_at, project_id, number)


def needs(job: Job, settings: Settings) -> dict[str, float]:
    """What the job's workers reserve; its reference, which is loaded before them, may need more GPUs."""
    num_workers = job.spec.get("num_workers", 1)  # a job that cannot be read ends when it is opened
    gpus = max(num_workers * settings.num_gpus_per_worker, settings.num_gpus_per_model if _reference(job) else 0)
    return {"CPU": float(num_workers)} | ({"GPU": gpus} if gpus else {})


def _reference(job: Job) -> str | None:
    """The application that scores for the job, if one may have to: until the job has begun to train."""
    if job.training is not None:
        return None
    try:
        spec = JobSpec.model_validate(job.spec)
    except ValidationError:
        return None
    is_served = spec.config.objective.traits.needs_reference and spec.reference_source != "trainer"
    return reference_of(job).app_name if is_served else None


def _beyond(needed: Resources, capacity: Resources) -> str | None:
    """In words. What Ray does not tell of is not in the way."""
    short = [
        f"{amount:g} {name}, and there are {capacity.get(name, 0):g}"
        for name, amount in needed.items()
        if capacity and amount > capacity.get(name, 0)
    ]
    return "; ".join(short) or None
