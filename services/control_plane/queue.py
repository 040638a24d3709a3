"""Which queued jobs may start now, and what the others wait for. The highest priority goes first, then the oldest.

A job that waits for room keeps its place, so that smaller ones behind it cannot starve it. One that waits for its
project's limit, or for a larger cluster, keeps nobody.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from services.control_plane.settings import Settings
from services.control_plane.tables import Job

Resources = Mapping[str, float]  # by Ray's names: CPU, GPU


def what_each_waits_for(
    live: Sequence[Job], limits: Mapping[str, int | None], capacity: Resources, settings: Settings
) -> dict[str, str | None]:
    """For each queued job: None if it may start now. `limits` are the projects' running jobs."""
    running = [job for job in live if job.observed == "running"]
    per_project = Counter(job.project_id for job in running)
    held = sum((Counter(needs(job, settings)) for job in running), Counter[str]())
    num_running, first = len(running), None
    waits: dict[str, str | None] = {}
    for job in sorted(_queued(live), key=lambda job: (-job.priority, job.created_at, job.id)):
        needed, limit = needs(job, settings), limits.get(job.project_id)
        if limit is not None and per_project[job.project_id] >= limit:
            waits[job.id] = f"another job of its project to end: {limit} may run at once"
        elif short := _beyond(needed, capacity):
            waits[job.id] = f"a larger cluster: it needs {short}"
        elif num_running >= settings.max_running_jobs:
            waits[job.id] = f"another job to end: {settings.max_running_jobs} may run at once"
        elif first is not None:
            waits[job.id] = f"its turn: {first} goes first"
        elif short := _beyond(Counter(needed) + held, capacity):
            first, waits[job.id] = job.id, f"running jobs to end: with them it needs {short}"
        else:
            waits[job.id] = None
            held += Counter(needed)
            per_project[job.project_id] += 1
            num_running += 1
    return waits


def needs(job: Job, settings: Settings) -> dict[str, float]:
    """What the job's workers reserve."""
    num_workers = job.spec.get("num_workers", 1)  # a job that cannot be read ends when it is opened
    gpus = num_workers * settings.num_gpus_per_worker
    return {"CPU": float(num_workers)} | ({"GPU": gpus} if gpus else {})


def _queued(live: Sequence[Job]) -> list[Job]:
    return [job for job in live if job.observed == "queued" and job.desired == "run"]


def _beyond(needed: Resources, capacity: Resources) -> str | None:
    """In words. What Ray does not tell of is not in the way."""
    short = [
        f"{amount:g} {name}, and there are {capacity.get(name, 0):g}"
        for name, amount in needed.items()
        if capacity and amount > capacity.get(name, 0)
    ]
    return "; ".join(short) or None
