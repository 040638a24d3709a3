"""Decides which action the service takes next for a job. The functions depend only on their arguments, and change
nothing.

An attempt is one run of a job on the Ray cluster. An attempt is open until it has ended; a job has at most one open
attempt. A rest is the waiting time between a failed attempt and the next one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from services.control_plane.core.tables import Attempt, Job
from services.control_plane.ray_api import AttemptStatus

HUNG_SECONDS = 300.0  # an attempt hangs if it gives no sign of life for this long; it should give one every few seconds
PAUSE_SECONDS = 600.0  # to pause, an attempt may take this long plus the time of PAUSE_STEPS training steps
PAUSE_STEPS = 3
FIRST_REST_SECONDS, REST_FACTOR, MOST_REST_SECONDS = 5.0, 5, 3600.0  # between a dead attempt and the next one
LONG_REST_SECONDS = 60.0  # in a rest of at least this length, another job may run in place of the resting one


class Decision(Enum):
    """An action for a job, such as to launch or to stop its attempt (run on Ray). The class Executor carries the action
    out.
    """

    WAIT = auto()  # do nothing now
    QUEUE = auto()  # no attempt may start now; write the reason to the job's `waits_for`
    OPEN = auto()  # add the row of a new attempt
    LAUNCH = auto()  # submit the attempt, which has a row, to Ray
    ADOPT = auto()  # mark the attempt as running: Ray launched it, but Ray's answer was lost
    STOP = auto()  # ask Ray to stop the attempt
    COLLECT = auto()  # the attempt ended: read its last reports from storage, then decide again
    FINISH = auto()  # end the job with the outcome that the attempt reported
    REST = auto()  # end an attempt that stopped on request; pause the job if the user still wants a pause
    LOSE = auto()  # end an attempt that died without reporting an outcome
    PAUSE = auto()  # mark the job as paused: no attempt is left
    CANCEL = auto()  # mark the job as cancelled: no attempt is left
    GIVE_UP = auto()  # mark the job as failed: too many attempts in a row failed


@dataclass(frozen=True)
class Past:
    """The facts besides the job and its current attempt (run on Ray) that a decision about the job depends on.

    These are: whether an attempt may start now, the number of failed attempts and its limit, the time since the last
    failure, and whether the current attempt hangs or should have paused by now.
    """

    slot: bool  # an attempt may start now: Ray answers, and it is the job's turn
    failures: int  # attempts that died by themselves, since the last attempt that left a new checkpoint
    limit: int  # the number of failures at which the job is given up
    rested_seconds: float = 0.0  # seconds since the last failure, by the database's clock
    hung: bool = False  # Ray says that the attempt runs, but it gave no sign of life for too long
    overdue: bool = False  # the attempt should have paused by now


def decide(job: Job, attempt: Attempt | None, status: AttemptStatus, past: Past, *, collected: bool) -> Decision:
    """Returns the next action for a job that has not ended.

    `attempt` is the job's open attempt (its current run on Ray), None if there is none. `status` is the status of this
    attempt in Ray. `past` holds all other facts that the decision depends on. `collected` says whether the attempt's
    last reports have been read from storage.
    """
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
    """Returns how many seconds a job waits before its next attempt (run on Ray), after `failures` failed attempts in a
    row."""
    return min(FIRST_REST_SECONDS * REST_FACTOR ** (failures - 1), MOST_REST_SECONDS) if failures else 0.0


def leaves_slot(failures: int) -> bool:
    """Whether another job may run in place of a job that waits for its next attempt (run on Ray), after `failures`
    failed attempts in a row.
    """
    return rest_seconds(failures) >= LONG_REST_SECONDS


def pause_seconds(job: Job) -> float:
    """Returns how many seconds the job's attempt (its run on Ray) may take to pause: more if the training steps are
    long."""
    progress = job.progress or {}
    steps = progress.get("done", 0) - progress.get("start", 0)
    if steps <= 0 or progress["stage"] != "training":
        return PAUSE_SECONDS
    seconds = float(progress["at"] - progress["since"])
    return PAUSE_SECONDS + PAUSE_STEPS * seconds / float(steps)


class Stopwatches:
    """Measures for how many seconds conditions have held, each condition by its name.

    Time in which this process checked no conditions does not count.
    """

    def __init__(self, *, gap_seconds: float, clock: Callable[[], float]) -> None:
        self._gap_seconds, self._clock = gap_seconds, clock
        self._since: dict[str, float] = {}
        self._asked: set[str] = set()
        self._looked_at = float("-inf")

    def look(self) -> None:
        """Begins a new round of checks. A condition that was not checked in the last round counts as new: how long it
        has held is measured from zero again.

        All conditions count as new if the last round began more than `gap_seconds` (an argument of the class) ago,
        because nobody knows what held in between.
        """
        in_time = self._clock() - self._looked_at <= self._gap_seconds
        self._since = {what: since for what, since in self._since.items() if in_time and what in self._asked}
        self._asked, self._looked_at = set(), self._clock()

    def seconds(self, what: str, holds: bool | None) -> float:
        """Returns for how many seconds the condition named `what` has held. `holds` says whether it holds now.

        If `holds` is None, it is unknown whether the condition holds. In this case, a measurement that is running
        continues, and no new measurement begins.
        """
        self._asked.add(what)
        if holds:
            self._since.setdefault(what, self._clock())
        elif holds is False:
            self._since.pop(what, None)
        return self._clock() - self._since.get(what, self._clock())
