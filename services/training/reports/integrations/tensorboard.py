"""Writes a job's metrics to TensorBoard's event files in the job's storage."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from services import storage
from services.contract import AttemptSpec, Started
from services.training.reports.integrations.sink import Status, Step

NAME = "events.out.tfevents"  # TensorBoard reads files whose names begin like this


class TensorboardSink:
    """Writes a job's metrics to TensorBoard's event files in storage.

    Each call writes a new file, because nothing can be appended to a file in storage. TensorBoard reads the files in
    order of name.
    """

    def __init__(self, spec: AttemptSpec, folder: Path) -> None:
        self._spec, self._folder = spec, folder
        self._uri = storage.join(spec.run_uri, "tensorboard")
        written = [int(name.split(".")[3]) for name in storage.list_files(self._uri) if name.startswith(NAME)]
        self.last_step = max(written, default=0)
        self.where = f"the event files are written to runs/{spec.job_id}/tensorboard in the service's storage"

    def begin(self, started: Started) -> None:
        facts = {"job": self._spec.job_id, "fine_tuned_model": self._spec.fine_tuned_model, **asdict(started.config)}
        with self._file(f"{0:08d}.config") as writer:
            writer.add_text("config", f"```json\n{json.dumps(facts, indent=2)}\n```", 0)

    def write(self, steps: Sequence[Step]) -> None:
        with self._file(f"{steps[-1].number:08d}.steps") as writer:
            for step in steps:
                for name, value in step.metrics.items():
                    writer.add_scalar(name, value, step.number, walltime=step.at)
        self.last_step = steps[-1].number

    def close(self, status: Status | None) -> None:
        if status is not None:
            with self._file(f"{self.last_step:08d}.then-{status}") as writer:
                writer.add_text("status", status, self.last_step)

    @contextmanager
    def _file(self, name: str) -> Iterator[Any]:
        from tensorboardX import SummaryWriter

        local = self._folder / name
        with SummaryWriter(str(local)) as writer:
            yield writer
        (file,) = local.iterdir()
        storage.write_file(storage.join(self._uri, f"{NAME}.{name}"), file)
        file.unlink()
