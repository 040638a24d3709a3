"""Which models are loaded, and what the others wait for. Nothing here acts, or looks at anything but its arguments.

Models that open attempts need as their reference come first and are never evicted. A model that loads or answers is
not evicted either; an idle one is, for others or for jobs. Those that wait take turns by when they were first asked
for. A model that is always busy leaves after its turn if others wait: it ends its answers and gets no new ones.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

TURN_SECONDS = 300.0  # that a busy model keeps its place while others wait
STAY_SECONDS = 60.0  # that a model nobody has used yet keeps its place: its client comes back after a 503
LOADING_SECONDS = 3600.0  # after which a model that still loads leaves its place to others


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that someone asked for. Durations are in seconds, until now."""

    app_name: str
    state: Literal["waiting", "loading", "running", "failed"]
    held: float = 0.0  # since it was given its place; of one that runs, since it does
    asked: float = 0.0  # since it was first asked for
    used: float = 0.0  # since it was last asked for or used
    pinned: bool = False  # an open attempt needs it as its reference
    answers: bool = False  # requests of it are in flight
    answered: bool = False  # since it got its place; or it had that as a reference

    @property
    def is_idle(self) -> bool:
        """Whether it may be evicted."""
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
    """What there is for models."""

    places: int
    gpus_each: float = 0.0
    gpus: float | None = None  # that running jobs leave; None: it is not known, or models need none
    gpus_of_next_job: float = 0.0  # which waits for models to leave them
    wait_seconds: float  # a model that nobody asked for since is not loaded
    idle_seconds: float | None = None  # after which an idle model is evicted though nobody waits

    def num_unpinned(self, *, beside_next_job: bool) -> int:
        """How many models have GPUs. Those that are pinned have their jobs' GPUs."""
        if self.gpus is None or not self.gpus_each:
            return self.places
        left = self.gpus - self.gpus_of_next_job * beside_next_job
        return min(self.places, max(0, int(left / self.gpus_each + 1e-6)))


@dataclass
class Plan:
    """What to do: serve these; forget those that are not wished any more; tell what each of the others waits for."""

    serve: set[str] = field(default_factory=set)
    forget: set[str] = field(default_factory=set)
    waits: dict[str, str] = field(default_factory=dict)  # one that is served and waits is leaving


def decide(models: Collection[Model], room: Room) -> Plan:
    """Who keeps its place, who gets one, and who leaves."""
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
    """The models that have places, while it is being decided."""

    def __init__(self, models: Sequence[Model], room: Room) -> None:
        unused = room.idle_seconds if room.idle_seconds is not None else float("inf")
        self._room = room
        self.models = [model for model in models if not (model.is_idle and model.used > unused)]
        self.leaving: dict[str, str] = {}

    def make_way(self, why: str, most: int, *, at_once: bool = False) -> None:
        """Evict idle models until so many are left that nobody pinned; busy ones leave, `at_once` or after a turn."""
        for _ in range(self._num_unpinned() - most - len(self.leaving)):
            if not self._evict():
                self._ask_to_leave(why, at_once=at_once)

    def take(self, model: Model) -> str | None:
        """Give the model a place, or say what it waits for."""
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
        """Whether there is anything that an evicted model would leave to this one."""
        return model.pinned or self._room.num_unpinned(beside_next_job=True) > 0

    def _num_unpinned(self) -> int:
        return sum(not model.pinned for model in self.models)

    def _evict(self) -> bool:
        """The idle model that was used the longest time ago, of those that failed before others."""
        idle = [model for model in self.models if model.is_idle]
        idle.sort(key=lambda model: (model.state != "failed", -model.used, model.app_name))
        if idle:
            self.models.remove(idle[0])
            self.leaving.pop(idle[0].app_name, None)
        return bool(idle)

    def _ask_to_leave(self, why: str, *, at_once: bool = False) -> None:
        """The busy model that has run for the longest time gets no new requests."""
        busy = [model for model in self.models if model.app_name not in self.leaving and not model.pinned]
        busy = [model for model in busy if model.had_its_turn or (at_once and model.state == "running")]
        if busy:
            self.leaving[max(busy, key=lambda model: (model.held, model.app_name)).app_name] = why


@dataclass(frozen=True)
class Engines:
    """What models mean to the jobs that wait."""

    gpus: float = 0.0  # that models hold which no job needs
    go_first: bool = False  # one has waited for GPUs since before the last job began: no job begins before it


NO_ENGINES = Engines()


def engines(
    models: Collection[Model], num_stopping: int, room: Room, *, capacity: float, since_last_job: float
) -> Engines:
    """`capacity`: all GPUs of the cluster; `since_last_job`: the seconds since one began."""
    loaded = [model for model in models if model.state != "waiting"]
    unpinned = sum(not model.pinned for model in loaded)
    waiting = [model for model in models if model.state == "waiting" and model.used <= room.wait_seconds]
    lacks_gpus = len(loaded) < room.places and room.gpus_each <= capacity
    go_first = lacks_gpus and any(model.asked > since_last_job for model in waiting)
    return Engines((unpinned + num_stopping) * room.gpus_each, go_first)
