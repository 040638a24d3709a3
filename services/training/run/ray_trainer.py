"""Ray Train's trainer, without the actors that an attempt has no use for."""

import os
from collections.abc import Mapping
from typing import Any

from ray.train import UserCallback
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR

from services.contract import Message
from services.training.run.deaths import cause_of

# Workers read their data from storage, and a placement group ends with the driver that asked for it.
UNUSED = (DatasetsCallback, PlacementGroupCleanerCallback)


class Trainer(TorchTrainer):  # type: ignore[misc]
    """Starts a controller, what its workers meet at, and the workers: three actors less, each worth two CPU seconds."""

    def __init__(self, *args: Any, **options: Any) -> None:
        # It would tell workers of nodes that are about to end. They go on from a checkpoint when one has ended.
        os.environ.setdefault(ENABLE_PREEMPTION_WATCHER_ENV_VAR, "0")
        super().__init__(*args, **options)

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, UNUSED)]


class TellDeaths(UserCallback):  # type: ignore[misc]
    """Tells the user why workers died; Ray Train starts others then, or gives the attempt up."""

    def __init__(self, reporter: Any) -> None:
        self._reporter = reporter

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        ranks = ", ".join(map(str, sorted(worker_exceptions)))
        cause = cause_of(*worker_exceptions.values())
        self._reporter.report.remote(Message(level="warn", message=f"Workers died (rank {ranks}): {cause}"))
