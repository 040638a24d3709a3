"""What to do next for a job. Nothing here acts, or looks at anything but its arguments."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from services.control_plane.core.tables import Attempt, Job
from services.control_plane.ray_api import AttemptStatus

HUNG_SECONDS = 300.0  # without a sign of life, of an attempt that beats every few seconds
PAUSE_SECONDS = 600.0  # to take the running steps, write the checkpoint and copy it
PAUSE_STEPS = 3
FIRST_REST_SECONDS, REST_FACTOR, MOST_REST_SECONDS = 5.0, 5, 3600.0  # between an attempt that died and the next


class Decision(Enum):
    WAIT = auto()
    OPEN = auto()  # write a new attempt
    LAUNCH = auto()  # submit the written attempt
    ADOPT = auto()  # it runs, though we never heard the launch's answer
    STOP = auto()
    COLLECT = auto()  # it ended: read its last reports, then decide again
    FINISH = auto()  # close the job as the attempt's outcome says
    REST = auto()  # the attempt stopped as it was told: pause the job, if that is still wished
    LOSE = auto()  # the attempt is dead without an outcome
    PAUSE = auto()  # no attempt is left
    CANCEL = auto()
    GIVE_UP = auto()


@dataclass(frozen=True)
class Past:
    """What else a decision rests on."""

    slot: bool  # an attempt may start now: Ray answers, and it is the job's turn
    failures: int  # attempts that died by themselves, since the last one that left a new checkpoint
    limit: int  # of such attempts
    rested_seconds: float = 0.0  # since the last of them died, by the database's clock
    hung: bool = False  # Ray says that the attempt runs, and it has given no sign of life for too long
    overdue: bool = False  # the attempt should have paused by now


def decide(job: Job, attempt: Attempt | None, status: AttemptStatus, past: Past, *, collected: bool) -> Decision:
    """What to do next for a live job. `status` is Ray's word on the open attempt; `collected`: its spool was read."""
    if attempt is None:
        return _without_attempt(job, past)
    if attempt.outcome is not None:
        return Decision.REST if attempt.outcome["kind"] == "paused" else Decision.FINISH
    if status == "unknown":
        return Decision.WAIT
    if status == "absent" and attempt.state == "launching" and job.desired == "run":
        return Decision.LAUNCH
    if status in ("pending", "running"):
        if job.desired == "cancel" or past.hung or past.overdue:
            return Decision.STOP
        return Decision.ADOPT if attempt.state == "launching" else Decision.WAIT
    if not collected:
        return Decision.COLLECT
    return Decision.LOSE


def _without_attempt(job: Job, past: Past) -> Decision:
    if job.desired == "cancel":
        return Decision.CANCEL
    if job.desired == "pause":
        return Decision.WAIT if job.observed == "paused" else Decision.PAUSE
    if past.failures >= past.limit:
        return Decision.GIVE_UP
    if job.observed == "running" and past.rested_seconds < rest_seconds(past.failures):
        return Decision.WAIT  # one that a user resumed starts at its turn
    return Decision.OPEN if past.slot else Decision.WAIT


def rest_seconds(failures: int) -> float:
    """How long after the last of so many failures in a row the next attempt may begin: what killed it may pass."""
    return min(FIRST_REST_SECONDS * REST_FACTOR ** (failures - 1), MOST_REST_SECONDS) if failures else 0.0


def pause_seconds(job: Job) -> float:
    """How long the job's attempt may take to pause: longer where steps are long."""
    progress = job.progress or {}
    steps = progress.get("done", 0) - progress.get("start", 0)
    if steps <= 0 or progress["stage"] != "training":
        return PAUSE_SECONDS
    seconds = float(progress["at"] - progress["since"])
    return PAUSE_SECONDS + PAUSE_STEPS * seconds / float(steps)


class Stopwatches:
    """How long something has held, as far as was seen here: what nobody watched counts for nothing."""

    def __init__(self, *, gap_seconds: float, clock: Callable[[], float]) -> None:
        self._gap_seconds, self._clock = gap_seconds, clock
        self._since: dict[str, float] = {}
        self._asked: set[str] = set()
        self._looked_at = float("-inf")

    def look(self) -> None:
        """Now, and again before `gap_seconds` are over; else all start anew, and what was not asked in between."""
        in_time = self._clock() - self._looked_at <= self._gap_seconds
        self._since = {what: since for what, since in self._since.items() if in_time and what in self._asked}
        self._asked, self._looked_at = set(), self._clock()

    def seconds(self, what: str, holds: bool | None) -> float:
        """None: it is not known, which begins nothing and ends nothing."""
        self._asked.add(what)
        if holds:
            self._since.setdefault(what, self._clock())
        elif holds is False:
            self._since.pop(what, None)
        return self._clock() - self._since.get(what, self._clock())
