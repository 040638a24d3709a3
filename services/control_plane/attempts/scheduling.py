"""Decides which queued jobs may start now, and gives the reason why each other job waits.

Projects take turns. The project with the fewest running workers in proportion to its weight goes first. If these are
equal, the project with the fewest worker hours in the last day in proportion to its weight goes first. If these are
equal too, the project whose next job is the oldest goes first. Within a project the job with the highest priority goes
first. If priorities are equal, the oldest job goes first.

A job that waits for free workers keeps its turn: no other job starts before it, so that small jobs cannot starve a
large one. A job that waits for its project's limit, or for a larger cluster, does not hold up other jobs.

A job starts only if its reference model can be loaded: at most `max_loaded_models` models are loaded. Reference models
of other running jobs, and pinned models (which their settings keep loaded), are not unloaded for it.

Jobs and models share the GPUs. A job's reference model is loaded before the job's workers start, on the GPUs that the
workers use afterwards. A job that waits for GPUs of loaded models keeps its turn, and idle models are unloaded for it.
If a model has waited for GPUs since before the newest job began, the model gets GPUs before the next job.

A running job whose last attempt (run on Ray) failed may wait long for its next attempt. During this wait it counts
neither as running nor as holding workers. After the wait, the job waits for its turn as if it were queued.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from services.contract import JobSpec
from services.control_plane.core.tables import Job
from services.control_plane.models.deployments.deployments import Reference
from services.control_plane.models.deployments.eviction import NO_ENGINES, Engines
from services.control_plane.models.models import NamedModel, reference_of
from services.control_plane.settings import Settings
from services.control_plane.tenants.quotas import Share

Resources = Mapping[str, float]  # amounts by Ray's names of resources: CPU, GPU
NO_SCORERS: Mapping[str, Reference] = {}
FOR_MODELS = "loaded models to free the GPUs that the job needs"
FOR_MODELS_TURN = "its turn on the GPUs, because a model that has waited longer goes first"


class Misfit(str):
    """A reason to wait that does not go away by itself: the cluster is too small for the job, or pinned models (which
    their settings keep loaded) leave too little of it. `remedy` says in a sentence what the user can do.
    """

    remedy: str

    def __new__(cls, what: str, remedy: str) -> "Misfit":
        misfit = super().__new__(cls, what)
        misfit.remedy = remedy
        return misfit


def what_each_waits_for(
    live: Sequence[Job],
    shares: Mapping[str, Share],
    capacity: Resources,
    settings: Settings,
    back: Collection[str] = (),
    engines: Engines = NO_ENGINES,
    scorers: Mapping[str, Reference] = NO_SCORERS,
) -> dict[str, str | None]:
    """Returns the reason why each queued job waits, by job id. The reason is None if the job may start now.

    `live` are the jobs that have not ended. `shares` holds the projects' weights and limits, and `capacity` the numbers
    of CPUs and GPUs of the cluster. `back` holds the ids of running jobs whose long wait after a failed attempt (run on
    Ray) is over; these jobs take turns like queued jobs. `engines` says which models must stay loaded, and how many
    GPUs models use. `scorers` maps a job's id to the Ray Serve application of the job's reference model.
    """
    running = [job for job in live if job.observed == "running" and job.id not in back]
    per_project = Counter(job.project_id for job in running)
    held = sum((Counter(needs(job, settings, scorers)) for job in running), Counter[str]())
    references = {name for job in running if (name := _reference(job, scorers))}
    num_running, first, places = len(running), None, settings.max_loaded_models
    waits: dict[str, str | None] = {}
    waiting = [job for job in live if job.desired == "run" and (job.observed == "queued" or job.id in back)]
    turns = _Turns(running, waiting, shares)

    def fewer_workers(job: Job, room: Resources) -> str:
        """Returns the beginning of a remedy for a job that does not fit into `room`. It is "Submit it with fewer
        workers (num_workers), or a" if the job fits with one worker, and otherwise "A". The caller appends "sk the
        operator …".
        """
        one = needs(job, settings, scorers, num_workers=1)
        return "A" if _beyond(one, room) else "Submit it with fewer workers (num_workers), or a"

    for job in turns:
        needed, limit = needs(job, settings, scorers), shares.get(job.project_id, Share()).max_running_jobs
        reference = {name} if (name := _reference(job, scorers)) else set[str]()
        if limit is not None and per_project[job.project_id] >= limit:
            waits[job.id] = (
                "another job of its project to end, "
                f"because at most {limit} may run at once (max_running_jobs of the project)"
            )
        elif short := _beyond(needed, capacity):
            remedy = f"{fewer_workers(job, capacity)}sk the operator for a larger cluster."
            waits[job.id] = Misfit(f"a larger cluster, because the job needs {short}", remedy)
        elif beside_pinned := _beyond(needed, unpinned := _without_pinned(capacity, engines)):
            pinned = f"models that always stay loaded use {engines.pinned_gpus:g} GPUs"
            remedy = f"{fewer_workers(job, unpinned)}sk the operator to pin fewer models, or for a larger cluster."
            waits[job.id] = Misfit(f"GPUs, because {pinned}, and the job needs {beside_pinned}", remedy)
        elif reference and len(reference | engines.pinned) > places:
            pinned = f"{len(engines.pinned)} models always stay loaded (pinned)"
            waits[job.id] = Misfit(
                "a place for its reference model, "
                f"because {pinned}, and at most {places} may be loaded (setting max_loaded_models)",
                "Ask the operator to pin fewer models, or to raise max_loaded_models.",
            )
        elif num_running >= settings.max_running_jobs:
            waits[job.id] = (
                "another job to end, "
                f"because at most {settings.max_running_jobs} may run at once (setting max_running_jobs)"
            )
        elif first is not None:
            goes_first = first.id if first.project_id == job.project_id else "a job of another project"
            waits[job.id] = f"its turn, because {goes_first} goes first"
        elif short := _beyond(Counter(needed) + held, capacity):
            first, waits[job.id] = job, f"running jobs to end, because together with them the job needs {short}"
        elif reference and len(references | reference | engines.pinned) > places:
            first = job
            of_whom = "their reference models" + (" and pinned models" if engines.pinned - references else "")
            waits[job.id] = (
                f"running jobs to end, because {of_whom} are as many models as may be loaded at once: {places} "
                "(setting max_loaded_models)"
            )
        elif needed.get("GPU") and engines.go_first:
            first, waits[job.id] = job, FOR_MODELS_TURN
        elif needed.get("GPU") and _beyond(Counter(needed) + held + Counter({"GPU": engines.gpus}), capacity):
            first, waits[job.id] = job, FOR_MODELS
        else:
            waits[job.id] = None
            references |= reference
            held += Counter(needed)
            per_project[job.project_id] += 1
            num_running += 1
            turns.start(job)
    return waits


class _Turns:
    """Iterates over the waiting jobs in the order in which they may start.

    A call of `start`, which counts a job's workers as running, changes the order of the jobs that follow.
    """

    def __init__(self, running: Sequence[Job], waiting: Sequence[Job], shares: Mapping[str, Share]) -> None:
        self._shares = shares
        self._workers: Counter[str] = Counter()  # running workers, by project
        self._queues: defaultdict[str, list[Job]] = defaultdict(list)
        for job in running:
            self.start(job)
        for job in waiting:
            self._queues[job.project_id].append(job)
        for queue in self._queues.values():
            queue.sort(key=lambda job: (-job.priority, job.created_at, job.id))

    def __iter__(self) -> Iterator[Job]:
        """Yields the waiting jobs of all projects in the order in which they may start.

        A project's position in this order is computed again only after one of its own jobs was yielded, because starts
        of other projects' jobs do not change it.
        """
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


def needs(
    job: Job, settings: Settings, scorers: Mapping[str, Reference] = NO_SCORERS, *, num_workers: int | None = None
) -> dict[str, float]:
    """Returns the numbers of CPUs and GPUs that the job needs, or would need with `num_workers` workers.

    The job needs what its workers need. If its reference model needs more GPUs than the workers, the GPUs of the
    reference model count, because the reference model is loaded before the workers start. `scorers` maps a job's id to
    the Ray Serve application of the job's reference model.
    """
    num_workers = num_workers or job.spec.get(
        "num_workers", 1
    )  # a job whose spec is unreadable fails when its attempt is opened
    of_reference = scorers[job.id].num_gpus if job.id in scorers else settings.num_gpus_per_model
    gpus = max(num_workers * settings.num_gpus_per_worker, of_reference if _reference(job, scorers) else 0)
    return {"CPU": float(num_workers)} | ({"GPU": gpus} if gpus else {})


def reference_model(job: Job) -> NamedModel | None:
    """Returns the job's reference model if vLLM may still have to compute log-probabilities with it.

    Returns None if the job has begun to train, or vLLM computes no log-probabilities for it, or its stored spec
    (description) cannot be read.
    """
    if job.training is not None:
        return None
    try:
        spec = JobSpec.model_validate(job.spec)
    except ValidationError:
        return None
    return reference_of(job) if spec.may_be_served else None


def _reference(job: Job, scorers: Mapping[str, Reference]) -> str | None:
    """Returns the name of the Ray Serve application that may have to compute the log-probabilities of the job's
    reference model.

    Returns None if no application has to compute them. `scorers` maps a job's id to the Ray Serve application of the
    job's reference model.
    """
    if (model := reference_model(job)) is None:
        return None
    return scorers[job.id].app_name if job.id in scorers else model.app_name


def _without_pinned(capacity: Resources, engines: Engines) -> Resources:
    return {name: amount - engines.pinned_gpus * (name == "GPU") for name, amount in capacity.items()}


def _beyond(needed: Resources, capacity: Resources) -> str | None:
    """Returns a text that names the needed resources that exceed the capacity. Returns None if none does.

    An empty `capacity` means that the capacity is unknown; the result is None.
    """
    short = [
        f"{amount:g} {name} but the cluster has {capacity.get(name, 0):g}"
        for name, amount in needed.items()
        if capacity and amount > capacity.get(name, 0)
    ]
    return "; ".join(short) or None
