"""Adapts Ray Train's TorchTrainer: it starts fewer Ray actors than Ray Train's own, and tells the user why workers
died."""

import os
from collections.abc import Mapping
from typing import Any

from ray.train import UserCallback
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import (
    ENABLE_PREEMPTION_WATCHER_ENV_VAR,
    WORKER_GROUP_START_TIMEOUT_S_ENV_VAR,
)

from services.contract import Message, Progress
from services.training.run.deaths import cause_of

# Neither is needed: workers read data from storage, and a placement group ends with the driver that asked for it.
UNUSED = (DatasetsCallback, PlacementGroupCleanerCallback)


START_SECONDS = 1800  # a model ends its answers before it leaves its GPU to the workers; a node takes minutes to come
WAITING = Progress(stage="waiting for workers", done=0, total=0)


class Trainer(TorchTrainer):  # type: ignore[misc]
    """A TorchTrainer that starts only three kinds of Ray actors: a controller, the workers, and the actor that
    synchronizes the workers.

    Ray Train itself would start three more actors, each of which takes two CPU seconds to start.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        # The watcher would warn workers that a node is about to end. Workers resume from a checkpoint after the end.
        os.environ.setdefault(ENABLE_PREEMPTION_WATCHER_ENV_VAR, "0")
        os.environ.setdefault(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, str(START_SECONDS))
        super().__init__(*args, **options)

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, UNUSED)]


class ReportDeaths(UserCallback):  # type: ignore[misc]
    """Tells the user why training workers died, whenever some die. Ray Train then starts new workers, or ends the
    attempt (this run of the job)."""

    def __init__(self, reporter: Any) -> None:
        self._reporter = reporter

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        ranks = ", ".join(map(str, sorted(worker_exceptions)))
        cause = cause_of(*worker_exceptions.values())
        self._reporter.report.remote(Message(level="warn", message=f"Training workers died (worker {ranks}): {cause}"))
        self._reporter.report.remote(WAITING)
