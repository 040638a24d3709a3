"""Decides what to do next for a job. The functions here only look at their arguments; the executor acts."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from services.control_plane.core.tables import Attempt, Job
from services.control_plane.ray_api import AttemptStatus

HUNG_SECONDS = 300.0  # an attempt hangs if it gives no sign of life for this long; it should give one every few seconds
PAUSE_SECONDS = 600.0  # an attempt may take this long, and PAUSE_STEPS steps, to pause
PAUSE_STEPS = 3
FIRST_REST_SECONDS, REST_FACTOR, MOST_REST_SECONDS = 5.0, 5, 3600.0  # between a dead attempt and the next one
LONG_REST_SECONDS = 60.0  # in a rest of at least this length, other jobs get the job's slot


class Decision(Enum):
    """A step that the executor can take for a job."""

    WAIT = auto()
    QUEUE = auto()  # no attempt may start now; write what the job waits for
    OPEN = auto()  # write a new attempt
    LAUNCH = auto()  # submit the written attempt
    ADOPT = auto()  # the attempt runs, although the answer to its launch was lost
    STOP = auto()
    COLLECT = auto()  # the attempt ended: read its last reports, then decide again
    FINISH = auto()  # close the job as the attempt's outcome says
    REST = auto()  # the attempt stopped because it was told to: pause the job if the user still wants that
    LOSE = auto()  # the attempt is dead without an outcome
    PAUSE = auto()  # no attempt is left
    CANCEL = auto()
    GIVE_UP = auto()


@dataclass(frozen=True)
class Past:
    """The rest of what a decision depends on."""

    slot: bool  # an attempt may start now: Ray answers, and it is the job's turn
    failures: int  # attempts that died by themselves, since the last one that left a new checkpoint
    limit: int  # the most failures before the job is given up
    rested_seconds: float = 0.0  # since the last failure, by the database's clock
    hung: bool = False  # Ray says that the attempt runs, but it gave no sign of life for too long
    overdue: bool = False  # the attempt should have paused by now


def decide(job: Job, attempt: Attempt | None, status: AttemptStatus, past: Past, *, collected: bool) -> Decision:
    """Decides for a live job. `status` is what Ray says of the open attempt; `collected`: its spool was read."""
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
        return Decision.WAIT  # (a job that the user paused and resumed is queued, and does not rest)
    return Decision.OPEN if past.slot else Decision.QUEUE


def rest_seconds(failures: int) -> float:
    """Returns how many seconds a job rests after this many failures in a row. Meanwhile the cause may pass."""
    return min(FIRST_REST_SECONDS * REST_FACTOR ** (failures - 1), MOST_REST_SECONDS) if failures else 0.0


def leaves_slot(failures: int) -> bool:
    """Whether a job rests so long after this many failures in a row that other jobs get its slot."""
    return rest_seconds(failures) >= LONG_REST_SECONDS


def pause_seconds(job: Job) -> float:
    """Returns how long the job's attempt may take to pause: longer if its steps are long."""
    progress = job.progress or {}
    steps = progress.get("done", 0) - progress.get("start", 0)
    if steps <= 0 or progress["stage"] != "training":
        return PAUSE_SECONDS
    seconds = float(progress["at"] - progress["since"])
    return PAUSE_SECONDS + PAUSE_STEPS * seconds / float(steps)


class Stopwatches:
    """Measures how long conditions have held. Time in which this process did not watch does not count."""

    def __init__(self, *, gap_seconds: float, clock: Callable[[], float]) -> None:
        self._gap_seconds, self._clock = gap_seconds, clock
        self._since: dict[str, float] = {}
        self._asked: set[str] = set()
        self._looked_at = float("-inf")

    def look(self) -> None:
        """Begins a new look.

        It resets stopwatches that were not asked for since the last look, and all if that was over `gap_seconds` ago.
        """
        in_time = self._clock() - self._looked_at <= self._gap_seconds
        self._since = {what: since for what, since in self._since.items() if in_time and what in self._asked}
        self._asked, self._looked_at = set(), self._clock()

    def seconds(self, what: str, holds: bool | None) -> float:
        """Returns for how long `what` has held. `holds` None means unknown: it neither starts nor resets anything."""
        self._asked.add(what)
        if holds:
            self._since.setdefault(what, self._clock())
        elif holds is False:
            self._since.pop(what, None)
        return self._clock() - self._since.get(what, self._clock())
