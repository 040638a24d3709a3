"""Decides which models are loaded and what the other requested models wait for. These are pure functions.

Models that open attempts need as their reference are pinned: they are loaded first and never evicted. A model that is
loading or answering is not evicted either; an idle model is, to make room for other models or for jobs. Waiting models
are loaded in the order in which they were first requested. A model that is always busy has a turn: after TURN_SECONDS,
and if others wait, it finishes its answers and gets no new requests.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

TURN_SECONDS = 300.0  # how long a busy model stays loaded while other models wait
STAY_SECONDS = 60.0  # how long a loaded model waits for its first request: the client retries after a 503
LOADING_SECONDS = 3600.0  # after this time a model that is still loading may be evicted


@dataclass(frozen=True, kw_only=True)
class Model:
    """A requested model, and how it has been used. All durations are in seconds and end now."""

    app_name: str
    state: Literal["waiting", "loading", "running", "failed"]
    held: float = 0.0  # since loading began; for a running model, since it has been running
    asked: float = 0.0  # since the first request for the model
    used: float = 0.0  # since the last request for the model
    pinned: bool = False  # whether an open attempt needs the model as its reference
    answers: bool = False  # whether requests to the model are in flight
    answered: bool = False  # whether the model has answered since it was loaded, or was loaded as a reference

    @property
    def is_idle(self) -> bool:
        """Whether the model may be evicted."""
        if self.state == "waiting" or self.pinned or self.answers:
            return False
        if self.state == "loading":
            return self.answered or self.held > LOADING_SECONDS
        return self.state == "failed" or self.answered or self.held > STAY_SECONDS

    @property
    def had_its_turn(self) -> bool:
        return self.state == "running" and not self.pinned and self.held > TURN_SECONDS


@dataclass(frozen=True, kw_only=True)
class Room:
    """The room that the cluster and the settings have for models."""

    places: int  # how many models may be loaded at a time
    gpus_each: float = 0.0  # GPUs of one model
    gpus: float | None = None  # GPUs that running jobs do not use; None: unknown, or models need none
    gpus_of_next_job: float = 0.0  # GPUs that the next job waits for
    wait_seconds: float  # a model whose last request is older than this is not loaded
    idle_seconds: float | None = None  # an idle model is evicted after this time even if no other model waits

    def num_unpinned(self, *, beside_next_job: bool) -> int:
        """Returns how many models that are not pinned may be loaded. A pinned model uses its job's GPUs."""
        if self.gpus is None or not self.gpus_each:
            return self.places
        left = self.gpus - self.gpus_of_next_job * beside_next_job
        return min(self.places, max(0, int(left / self.gpus_each + 1e-6)))


@dataclass
class Plan:
    """The decision: the models to serve, those to forget, and what each of the others waits for."""

    serve: set[str] = field(default_factory=set)
    forget: set[str] = field(default_factory=set)
    waits: dict[str, str] = field(default_factory=dict)  # by model; a served model in here gets no new requests


def decide(models: Collection[Model], room: Room) -> Plan:
    """Decides which models stay loaded, which are loaded next, and which are evicted."""
    queue = sorted(
        (model for model in models if model.state == "waiting" and (model.pinned or model.used <= room.wait_seconds)),
        key=lambda model: (not model.pinned, -model.asked, model.app_name),
    )
    served = _Served([model for model in models if model.state != "waiting"], room)
    served.make_way("running jobs need its GPU", room.num_unpinned(beside_next_job=False), at_once=True)
    served.make_way("the next job needs its GPU", room.num_unpinned(beside_next_job=True))
    plan = Plan()
    for model in queue:
        if reason := served.take(model):
            plan.waits[model.app_name] = reason
    plan.serve = {model.app_name for model in served.models}
    plan.waits |= {name: f"its next turn: {reason}" for name, reason in served.leaving.items()}
    plan.forget = {model.app_name for model in models} - plan.serve - plan.waits.keys()
    return plan


class _Served:
    """The set of models to serve, while `decide` changes the set."""

    def __init__(self, models: Sequence[Model], room: Room) -> None:
        unused = room.idle_seconds if room.idle_seconds is not None else float("inf")
        self._room = room
        self.models = [model for model in models if not (model.is_idle and model.used > unused)]
        self.leaving: dict[str, str] = {}

    def make_way(self, why: str, most: int, *, at_once: bool = False) -> None:
        """Evicts idle models until at most `most` models that are not pinned are left.

        If too few models are idle, busy ones stop getting requests: after their turn, or `at_once`.
        """
        for _ in range(self._num_unpinned() - most - len(self.leaving)):
            if not self._evict():
                self._ask_to_leave(why, at_once=at_once)

    def take(self, model: Model) -> str | None:
        """Adds the model to the served ones, or returns what the model waits for."""
        while reason := self._lacks(model):
            if not self._would_help(model):
                return reason
            if not self._evict():
                self._ask_to_leave("another model waits")
                return reason
        self.models.append(model)
        return None

    def _lacks(self, model: Model) -> str | None:
        room = self._room
        if len(self.models) >= room.places:
            return f"a place: {len(self.models)} models hold all {room.places} places, and load or answer"
        if model.pinned or self._num_unpinned() < room.num_unpinned(beside_next_job=True):
            return None
        jobs = f"jobs leave {max(0.0, (room.gpus or 0.0) - room.gpus_of_next_job):g} GPUs to models"
        return f"GPUs: {jobs}, {self._num_unpinned()} models hold theirs, and it needs {room.gpus_each:g}"

    def _would_help(self, model: Model) -> bool:
        """Whether evicting another model could make room for this one."""
        return model.pinned or self._room.num_unpinned(beside_next_job=True) > 0

    def _num_unpinned(self) -> int:
        return sum(not model.pinned for model in self.models)

    def _evict(self) -> bool:
        """Removes one idle model, a failed one if there is one, else the least recently used. False: none is idle."""
        idle = [model for model in self.models if model.is_idle]
        idle.sort(key=lambda model: (model.state != "failed", -model.used, model.app_name))
        if idle:
            self.models.remove(idle[0])
            self.leaving.pop(idle[0].app_name, None)
        return bool(idle)

    def _ask_to_leave(self, why: str, *, at_once: bool = False) -> None:
        """Stops new requests to the busy model that has run longest, which then waits with the reason `why`.

        Only a model whose turn is over is chosen; with `at_once`, any running model. Pinned models are never chosen.
        """
        busy = [model for model in self.models if model.app_name not in self.leaving and not model.pinned]
        busy = [model for model in busy if model.had_its_turn or (at_once and model.state == "running")]
        if busy:
            self.leaving[max(busy, key=lambda model: (model.held, model.app_name)).app_name] = why


@dataclass(frozen=True)
class Engines:
    """What the scheduler of jobs must know about models."""

    gpus: float = 0.0  # GPUs of models that no job needs as its reference
    go_first: bool = False  # whether a model has waited for GPUs since before the last job began, and goes first now


NO_ENGINES = Engines()


def engines(
    models: Collection[Model], num_stopping: int, room: Room, *, capacity: float, since_last_job: float
) -> Engines:
    """Returns what the scheduler of jobs must know about models.

    `capacity` is the number of the cluster's GPUs, `since_last_job` the seconds since the last job began.
    """
    loaded = [model for model in models if model.state != "waiting"]
    unpinned = sum(not model.pinned for model in loaded)
    waiting = [model for model in models if model.state == "waiting" and model.used <= room.wait_seconds]
    lacks_gpus = len(loaded) < room.places and room.gpus_each <= capacity
    go_first = lacks_gpus and any(model.asked > since_last_job for model in waiting)
    return Engines((unpinned + num_stopping) * room.gpus_each, go_first)
