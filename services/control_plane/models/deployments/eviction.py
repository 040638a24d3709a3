"""Decides which of the requested models are loaded, and what the others wait for. The functions use only their
arguments.

Reference models of running jobs are loaded first, then pinned models (which their settings keep loaded). Models of
these two kinds are never evicted (unloaded). A model that is loading or answering is not evicted either. An idle model
is evicted after its own `idle_seconds`, or to make room for other models or for jobs. A model that only jobs have
requested is evicted a minute after a job has last used the model.

Waiting models are loaded in the order in which they were first requested. A model that is always busy has a turn: it
runs for TURN_SECONDS while other models wait. After its turn it gets no new requests, and is unloaded when its answers
are complete.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

TURN_SECONDS = 300.0  # how long a busy model stays loaded while other models wait
STAY_SECONDS = 60.0  # how long a loaded model waits for its first request, which a client repeats after a 503
LOADING_SECONDS = 3600.0  # after this time a model that is still loading may be evicted


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that users or jobs ask for, its state and its recent use.

    `held`, `asked` and `used` are seconds: how long ago something happened.
    """

    app_name: str
    state: Literal["waiting", "loading", "running", "failed"]
    held: float = 0.0  # since loading began; for a running model, since it has been running
    asked: float = 0.0  # since the first request for the model
    used: float = 0.0  # since the last request for the model
    gpus: float = 0.0  # GPUs of all its replicas
    is_reference: bool = False  # whether an open attempt needs the model as its reference
    for_jobs: bool = False  # whether only jobs have requested the model, as their reference
    pinned: bool = False  # whether its settings keep the model loaded
    idle_seconds: float | None = None  # an idle model is evicted after this time even if no other model waits
    answers: bool = False  # whether requests to the model are in flight
    answered: bool = False  # whether the model has answered since it was loaded, or was loaded as a reference

    @property
    def is_idle(self) -> bool:
        """Whether the model may be evicted (unloaded) to make room."""
        if self.state == "waiting" or self.stays or self.answers:
            return False
        if self.state == "loading":
            return self.answered or self.held > LOADING_SECONDS
        return self.state == "failed" or self.answered or self.held > STAY_SECONDS

    @property
    def stays(self) -> bool:
        """Whether the model is never evicted (unloaded), because it is the reference of a running job, or because its
        settings pin it.
        """
        return self.is_reference or self.pinned

    @property
    def is_unused(self) -> bool:
        """Whether nobody has used the model for longer than `idle_seconds`, or STAY_SECONDS if only jobs have requested
        it. Such a model is evicted (unloaded) even if no other model needs its memory."""
        limit = self._idle_limit
        return self.is_idle and limit is not None and self.used > limit

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the running model is evicted (unloaded) if nobody uses it. None if it is not evicted for this
        reason: it stays, it is answering requests, or no limit of its idle time is set."""
        limit = self._idle_limit
        if self.state != "running" or self.stays or self.answers or limit is None:
            return None
        until_idle = 0.0 if self.answered else STAY_SECONDS - self.held
        return max(0.0, until_idle, limit - self.used)

    @property
    def _idle_limit(self) -> float | None:
        return STAY_SECONDS if self.for_jobs else self.idle_seconds

    def is_awaited(self, wait_seconds: float) -> bool:
        """Whether this model, which is not loaded yet, must still be loaded. There are two possible reasons:

        - The model must stay loaded, because its settings pin it (keep it loaded), or because it is the reference model
          of a job.
        - A client requested the model at most `wait_seconds` ago.
        """
        return self.stays or (not self.for_jobs and self.used <= wait_seconds)

    @property
    def had_its_turn(self) -> bool:
        """Whether the model has run for longer than a busy model may run while other models wait."""
        return self.state == "running" and not self.stays and self.held > TURN_SECONDS


@dataclass(frozen=True, kw_only=True)
class Room:
    """The room for loaded models: the number of models that may be loaded at a time (`places`), the number of GPUs that
    they may use, and the number of GPUs that the next job waits for.
    """

    places: int  # how many models may be loaded at a time
    gpus: float | None = None  # GPUs that running jobs do not use; None: unknown, or models need none
    gpus_of_next_job: float = 0.0  # GPUs that the next job waits for
    wait_seconds: float  # a model whose last request is older than this is not loaded

    def most_gpus(self, *, beside_next_job: bool) -> float:
        """Returns how many GPUs all models together may use, not counting reference models, which use the GPUs of their
        jobs.

        If `beside_next_job` is true, the GPUs that the next job waits for are left free.
        """
        if self.gpus is None:
            return float("inf")
        return max(0.0, self.gpus - self.gpus_of_next_job * beside_next_job)


@dataclass
class Plan:
    """The result of `decide`: the models to serve (`serve`), the models whose rows in the table `deployments` are to be
    deleted (`forget`), and what each other model waits for (`waits`).
    """

    serve: set[str] = field(default_factory=set)
    forget: set[str] = field(default_factory=set)
    waits: dict[str, str] = field(default_factory=dict)  # reasons by model; a served model in here gets no new requests


def decide(models: Collection[Model], room: Room) -> Plan:
    """Decides which models stay loaded, which are loaded now, and which are evicted (unloaded).

    `models` are all requested models, and `room` says how many models and GPUs are allowed.
    """
    queue = sorted(
        (model for model in models if model.state == "waiting" and model.is_awaited(room.wait_seconds)),
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
    """The set of models to serve. `decide` starts with the loaded models, and removes and adds models step by step."""

    def __init__(self, models: Sequence[Model], room: Room) -> None:
        self._room = room
        self.models = list(models)
        self.leaving: dict[str, str] = {}

    def make_way(self, why: str, *, beside_next_job: bool) -> None:
        """Evicts (unloads) idle models until the remaining models fit into the allowed numbers of models and GPUs.

        Reference models do not count. If too few models are idle, some busy models get no further requests, so that
        they become idle. Clients whose requests wait for such a model are told the reason `why`.

        If `beside_next_job` is true, the models must also leave free the GPUs that the next job waits for, and only
        busy models that have run for TURN_SECONDS are chosen. If `beside_next_job` is false, running jobs need the
        GPUs, so busy models are chosen however long they have run.
        """
        most = self._room.most_gpus(beside_next_job=beside_next_job)
        while (few := len(self._others()) > self._room.places) or _exceeds(self._gpus(), most):
            if not self._evict(on_gpus=not few) and not self._ask_to_leave(why, at_once=not beside_next_job):
                return

    def take(self, model: Model) -> str | None:
        """Adds a waiting model to the models to serve. Evicts (unloads) idle models if the model needs their room.

        Returns None if the model was added. If there is no room for it, returns a phrase that says what the model waits
        for.
        """
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
        """Returns why the model cannot be loaded now. Returns None if it can be loaded.

        The result is a pair: a phrase that says what the model waits for, and whether it waits for GPUs.
        """
        room = self._room
        if len(self.models) >= room.places:
            loaded = f"{len(self.models)} of at most {room.places} models are loaded"
            return f"another model to be idle: {loaded}, and all are loading or answering", False
        most = room.most_gpus(beside_next_job=True)
        if model.is_reference or not _exceeds(self._gpus(leaving=True) + model.gpus, most):
            return None
        others = [other for other in self.models if other.gpus and not other.is_reference]
        jobs = f"jobs leave {most:g} GPUs to models"
        return f"GPUs: {jobs}, {len(others)} loaded models use some of them, and this model needs {model.gpus:g}", True

    def _would_help(self, model: Model) -> bool:
        """Whether evicting (unloading) other models could ever make room for this model."""
        pinned = sum(other.gpus for other in self.models if other.pinned and not other.is_reference)
        return model.is_reference or not _exceeds(pinned + model.gpus, self._room.most_gpus(beside_next_job=True))

    def _others(self) -> list[Model]:
        """Returns those of the models to serve that are no reference models of jobs and still accept new requests."""
        return [model for model in self.models if not model.is_reference and model.app_name not in self.leaving]

    def _gpus(self, *, leaving: bool = False) -> float:
        models = [model for model in self.models if not model.is_reference] if leaving else self._others()
        return sum(model.gpus for model in models)

    def _evict(self, *, on_gpus: bool) -> bool:
        """Removes one idle model from the models to serve: a failed one if there is one, else the least recently used
        one.

        If `on_gpus` is true, considers only models that hold GPUs. Returns False if no such model is idle.
        """
        idle = [model for model in self.models if model.is_idle and (model.gpus or not on_gpus)]
        idle.sort(key=lambda model: (model.state != "failed", -model.used, model.app_name))
        if idle:
            self.models.remove(idle[0])
            self.leaving.pop(idle[0].app_name, None)
        return bool(idle)

    def _ask_to_leave(self, why: str, *, at_once: bool = False) -> bool:
        """Closes one busy model to new requests, so that it can be unloaded: the busy model that has run longest. `why`
        is the reason; clients whose requests wait for this model are told `why`.

        If `at_once` is true, considers all running models. Otherwise considers only models that have run for longer
        than TURN_SECONDS. Never chooses reference models and pinned (always loaded) models. Returns False if no model
        can be chosen.
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
    """What the scheduler of jobs must know about models: how many GPUs they use, which of them are pinned (always kept
    loaded), and whether a waiting model gets GPUs before the next job.
    """

    gpus: float = 0.0  # GPUs of models that no job needs as its reference
    pinned: frozenset[str] = frozenset()  # application names of pinned models, which their settings keep loaded
    pinned_gpus: float = 0.0  # GPUs of pinned models
    go_first: bool = False  # whether a model has waited for GPUs since before the last job began; it then precedes jobs


NO_ENGINES = Engines()


def engines(
    models: Collection[Model], stopping_gpus: float, room: Room, *, capacity: float, since_last_job: float
) -> Engines:
    """Returns which models are pinned (always kept loaded), how many GPUs models use, and whether a waiting model gets
    GPUs before the next job. The scheduler of jobs needs all three.

    `stopping_gpus` is the number of GPUs of models that Ray Serve is removing. `room` holds the numbers of models and
    GPUs that are allowed. `capacity` is the number of GPUs in the cluster. `since_last_job` is the number of seconds
    since the last job began.
    """
    loaded = [model for model in models if model.state != "waiting"]
    others = [model for model in loaded if not model.is_reference]
    pinned = frozenset(model.app_name for model in models if model.pinned)
    pinned_gpus = sum(model.gpus for model in models if model.pinned)
    waiting = [model for model in models if model.state == "waiting" and model.asked > since_last_job]
    waiting = [model for model in waiting if model.is_awaited(room.wait_seconds) and not model.is_reference]
    fits = any(0 < model.gpus <= capacity - pinned_gpus * (not model.pinned) for model in waiting)
    go_first = len(loaded) < room.places and fits
    return Engines(sum(model.gpus for model in others) + stopping_gpus, pinned, pinned_gpus, go_first)
