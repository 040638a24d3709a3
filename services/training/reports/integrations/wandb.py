"""Writes a job's metrics to a Weights & Biases run.

If the cluster has no key for W&B, the run is written to a file in storage, which a user can send to W&B later.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from services import storage
from services.contract import AttemptSpec, Started, Wandb
from services.training.reports.integrations.sink import Status, Step

INIT_SECONDS = 60.0


class WandbSink:
    """Writes a job's metrics to one Weights & Biases run. If the cluster has no key for W&B, writes the run to a file
    instead.

    Another attempt (run of the job) may resume the job. If the cluster has a key, the attempt asks the W&B server for
    the run's last step, and continues after this step. Without a key there is no server to ask, so each attempt writes
    its file from step 1.
    """

    def __init__(self, options: Wandb, run_id: str, spec: AttemptSpec, folder: Path) -> None:
        import wandb

        wandb.teardown()  # otherwise wandb keeps a run of the same id that could not be opened
        self._spec = spec
        self._folder_name = f"offline-run-{run_id}"  # the name that `wandb sync` expects
        self._offline = os.environ.get("WANDB_MODE", "online") != "online" or not os.environ.get("WANDB_API_KEY")
        job_tags = ["raydpo", f"raydpo/{spec.config.objective.type}", f"raydpo/{spec.job_id}"]
        self._run = wandb.init(
            project=options.project,
            entity=options.entity,
            name=options.name or spec.job_id,
            tags=[*job_tags, *(options.tags or ())],
            id=run_id,
            mode="offline" if self._offline else "online",
            resume=None if self._offline else "allow",
            config={"job": spec.job_id, "fine_tuned_model": spec.fine_tuned_model},
            settings=_settings(folder),
        )
        self.last_step = max(0, self._run.starting_step - 1)
        self.where = self._where_offline() if self._offline else str(self._run.url)

    def begin(self, started: Started) -> None:
        facts = {"num_groups": started.num_groups, "total_steps": started.total_steps}
        self._run.config.update(asdict(started.config) | facts, allow_val_change=True)

    def write(self, steps: Sequence[Step]) -> None:
        for step in steps:
            self._run.log({**step.metrics, "_timestamp": step.at}, step=step.number)
        self.last_step = steps[-1].number
        self._publish()

    def close(self, status: Status | None) -> None:
        import wandb

        self._run.summary.update({"status": status or "interrupted"})
        self._run.finish(exit_code=0 if status == "succeeded" else 1)
        wandb.teardown()  # completes the offline file
        self._publish()

    def _publish(self) -> None:
        if self._offline:
            file = Path(self._run.settings.sync_file)
            storage.write_file(storage.join(self._spec.run_uri, "wandb", self._folder_name, file.name), file)

    def _where_offline(self) -> str:
        why = "WANDB_MODE is not online" if os.environ.get("WANDB_API_KEY") else "WANDB_API_KEY is not set"
        return (
            f"the cluster does not send to Weights & Biases ({why}), so the run is written to "
            f"runs/{self._spec.job_id}/wandb/{self._folder_name} in the service's storage; "
            f"send it later with `wandb sync {self._folder_name}` and a key"
        )


def _settings(folder: Path) -> object:
    """Returns settings with which W&B sends metrics only, and nothing about the machine, its console or its code."""
    import wandb

    return wandb.Settings(
        root_dir=str(folder),
        init_timeout=INIT_SECONDS,
        console="off",
        silent=True,
        host="ray",
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
