"""Decides which models are loaded, and what the other requested models wait for. The functions depend only on their
arguments.

Reference models of running jobs are loaded first, then pinned models; neither are ever evicted (unloaded). A model that
is loading or answering is not evicted either. An idle model is evicted after its own `idle_seconds`, or to make room
for other models or for jobs. Waiting models are loaded in the order in which they were first requested. A model that is
always busy may run for TURN_SECONDS while other models wait; afterwards it finishes its answers and gets no new
requests.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

TURN_SECONDS = 300.0  # how long a busy model stays loaded while other models wait
STAY_SECONDS = 60.0  # how long a loaded model waits for its first request: the client retries after a 503
LOADING_SECONDS = 3600.0  # after this time a model that is still loading may be evicted


@dataclass(frozen=True, kw_only=True)
class Model:
    """A requested model and its recent use. All durations are in seconds, up to now."""

    app_name: str
    state: Literal["waiting", "loading", "running", "failed"]
    held: float = 0.0  # since loading began; for a running model, since it has been running
    asked: float = 0.0  # since the first request for the model
    used: float = 0.0  # since the last request for the model
    gpus: float = 0.0  # GPUs of all its replicas
    is_reference: bool = False  # whether an open attempt needs the model as its reference
    pinned: bool = False  # whether its settings keep the model loaded
    idle_seconds: float | None = None  # an idle model is evicted after this time even if no other model waits
    answers: bool = False  # whether requests to the model are in flight
    answered: bool = False  # whether the model has answered since it was loaded, or was loaded as a reference

    @property
    def is_idle(self) -> bool:
        """Whether the model may be evicted."""
        if self.state == "waiting" or self.stays or self.answers:
            return False
        if self.state == "loading":
            return self.answered or self.held > LOADING_SECONDS
        return self.state == "failed" or self.answered or self.held > STAY_SECONDS

    @property
    def stays(self) -> bool:
        return self.is_reference or self.pinned

    @property
    def is_unused(self) -> bool:
        """Whether the model has been unused for so long that it is evicted even if no other model needs its memory."""
        return self.is_idle and self.idle_seconds is not None and self.used > self.idle_seconds

    @property
    def had_its_turn(self) -> bool:
        return self.state == "running" and not self.stays and self.held > TURN_SECONDS


@dataclass(frozen=True, kw_only=True)
class Room:
    """The number of models that may be loaded, and the number of GPUs that they may use, according to the settings and
    the cluster."""

    places: int  # how many models may be loaded at a time
    gpus: float | None = None  # GPUs that running jobs do not use; None: unknown, or models need none
    gpus_of_next_job: float = 0.0  # GPUs that the next job waits for
    wait_seconds: float  # a model whose last request is older than this is not loaded

    def most_gpus(self, *, beside_next_job: bool) -> float:
        """Returns how many GPUs the models may use together, without reference models, which use their jobs' GPUs."""
        if self.gpus is None:
            return float("inf")
        return max(0.0, self.gpus - self.gpus_of_next_job * beside_next_job)


@dataclass
class Plan:
    """The decision: the models to serve, the models whose rows are deleted, and what each other model waits for."""

    serve: set[str] = field(default_factory=set)
    forget: set[str] = field(default_factory=set)
    waits: dict[str, str] = field(default_factory=dict)  # by model; a served model in here gets no new requests


def decide(models: Collection[Model], room: Room) -> Plan:
    """Decides which models stay loaded, which are loaded next, and which are evicted."""
    queue = sorted(
        (model for model in models if model.state == "waiting" and (model.stays or model.used <= room.wait_seconds)),
        key=lambda model: (not model.is_reference, not model.pinned, -model.asked, model.app_name),
    )
    served = _Served([model for model in models if model.state != "waiting" and not model.is_unused], room)
    served.make_way("running jobs need the GPU that it used", beside_next_job=False)
    served.make_way("the next job needs the GPU that it used", beside_next_job=True)
    plan = Plan()
    for model in queue:
        if reason := served.take(model):
            plan.waits[model.app_name] = reason
    plan.serve = {model.app_name for model in served.models}
    plan.waits |= {name: f"its next turn, because {reason}" for name, reason in served.leaving.items()}
    plan.forget = {model.app_name for model in models} - plan.serve - plan.waits.keys()
    return plan


class _Served:
    """The set of models to serve, which `decide` builds step by step."""

    def __init__(self, models: Sequence[Model], room: Room) -> None:
        self._room = room
        self.models = list(models)
        self.leaving: dict[str, str] = {}

    def make_way(self, why: str, *, beside_next_job: bool) -> None:
        """Evicts idle models until the models other than reference models fit into the room.

        If too few models are idle, busy models get no further requests: after their turn, or immediately if running
        jobs need the GPUs.
        """
        most = self._room.most_gpus(beside_next_job=beside_next_job)
        while (few := len(self._others()) > self._room.places) or _exceeds(self._gpus(), most):
            if not self._evict(on_gpus=not few) and not self._ask_to_leave(why, at_once=not beside_next_job):
                return

    def take(self, model: Model) -> str | None:
        """Adds the model to the models to serve and returns None, or returns what the model waits for."""
        while lack := self._lacks(model):
            reason, on_gpus = lack
            if not self._would_help(model):
                return reason
            if not self._evict(on_gpus=on_gpus):
                self._ask_to_leave("another model waits")
                return reason
        self.models.append(model)
        return None

    def _lacks(self, model: Model) -> tuple[str, bool] | None:
        """Returns a phrase for the resource that the model waits for, and whether the resource is GPUs; None if the
        model can be loaded."""
        room = self._room
        if len(self.models) >= room.places:
            loaded = f"{len(self.models)} of at most {room.places} models are loaded"
            return f"another model to be idle: {loaded}, and all load or answer", False
        most = room.most_gpus(beside_next_job=True)
        if model.is_reference or not _exceeds(self._gpus(leaving=True) + model.gpus, most):
            return None
        others = [other for other in self.models if other.gpus and not other.is_reference]
        jobs = f"jobs leave {most:g} GPUs to models"
        return f"GPUs: {jobs}, {len(others)} loaded models use some of them, and it needs {model.gpus:g}", True

    def _would_help(self, model: Model) -> bool:
        """Whether evicting other models could make room for this one."""
        pinned = sum(other.gpus for other in self.models if other.pinned and not other.is_reference)
        return model.is_reference or not _exceeds(pinned + model.gpus, self._room.most_gpus(beside_next_job=True))

    def _others(self) -> list[Model]:
        """Returns the models other than reference models that are not being unloaded."""
        return [model for model in self.models if not model.is_reference and model.app_name not in self.leaving]

    def _gpus(self, *, leaving: bool = False) -> float:
        models = [model for model in self.models if not model.is_reference] if leaving else self._others()
        return sum(model.gpus for model in models)

    def _evict(self, *, on_gpus: bool) -> bool:
        """Removes one idle model: a failed one if there is one, else the least recently used one. Returns False if no
        model is idle.

        With `on_gpus`, considers only models that hold GPUs.
        """
        idle = [model for model in self.models if model.is_idle and (model.gpus or not on_gpus)]
        idle.sort(key=lambda model: (model.state != "failed", -model.used, model.app_name))
        if idle:
            self.models.remove(idle[0])
            self.leaving.pop(idle[0].app_name, None)
        return bool(idle)

    def _ask_to_leave(self, why: str, *, at_once: bool = False) -> bool:
        """Stops new requests to the busy model that has run longest. Requests for this model then wait, with the reason
        `why`.

        Only models whose turn is over are considered or, with `at_once`, all running models. Reference models and
        pinned models are never chosen. Returns False if there is no such model.
        """
        busy = [model for model in self._others() if not model.stays]
        busy = [model for model in busy if model.had_its_turn or (at_once and model.state == "running")]
        if busy:
            self.leaving[max(busy, key=lambda model: (model.held, model.app_name)).app_name] = why
        return bool(busy)


def _exceeds(gpus: float, most: float) -> bool:
    return gpus > most + 1e-6  # shares of a GPU are rounded


@dataclass(frozen=True)
class Engines:
    """The use of GPUs by models, as the scheduler of jobs needs it."""

    gpus: float = 0.0  # GPUs of models that no job needs as its reference
    pinned_gpus: float = 0.0  # those that the models' settings keep loaded
    go_first: bool = False  # whether a model has waited for GPUs since before the last job began, and goes first now


NO_ENGINES = Engines()


def engines(
    models: Collection[Model], stopping_gpus: float, room: Room, *, capacity: float, since_last_job: float
) -> Engines:
    """Returns how many GPUs models use or wait for, for the scheduler of jobs.

    `stopping_gpus` is the number of GPUs of models that Ray Serve is removing, `capacity` is the number of GPUs in the
    cluster, and `since_last_job` is the number of seconds since the last job began.
    """
    loaded = [model for model in models if model.state != "waiting"]
    others = [model for model in loaded if not model.is_reference]
    pinned = sum(model.gpus for model in models if model.pinned)
    waiting = [model for model in models if model.state == "waiting" and model.asked > since_last_job]
    waiting = [model for model in waiting if model.pinned or model.used <= room.wait_seconds]
    fits = any(0 < model.gpus <= capacity - pinned * (not model.pinned) for model in waiting)
    go_first = len(loaded) < room.places and fits
    return Engines(sum(model.gpus for model in others) + stopping_gpus, pinned, go_first)
