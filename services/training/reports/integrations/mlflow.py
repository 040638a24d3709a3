"""Writes a job's metrics to an MLflow run, in the cluster's MLflow server or in a database file in storage."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from services import storage
from services.contract import AttemptSpec, Mlflow, Started
from services.training.reports.integrations.sink import Status, Step

METRICS_PER_BATCH = 1000  # MLflow's limit
JOB_TAG = "raydpo.job"


class MlflowSink:
    """Writes a job's metrics to one MLflow run, which a tag with the job's id identifies.

    Later attempts of the job (its later runs on Ray) continue the same MLflow run.
    """

    def __init__(self, options: Mlflow, spec: AttemptSpec, folder: Path) -> None:
        from mlflow import MlflowClient

        self._file = folder / "mlflow.db"
        self._uri = storage.join(spec.run_uri, "mlflow", self._file.name)
        server = os.environ.get("MLFLOW_TRACKING_URI")
        self._local = not server
        if self._local and storage.exists(self._uri):
            self._file.write_bytes(storage.read_bytes(self._uri))
        self._client = MlflowClient(tracking_uri=server or f"sqlite:///{self._file}")
        self._run_id = self._find(options, spec)
        history = self._client.get_metric_history(self._run_id, "train/loss")
        self.last_step = max((metric.step for metric in history), default=0)
        self.where = self._link(server) if server else self._where_local(spec.job_id)

    def begin(self, started: Started) -> None:
        from mlflow.entities import Param

        facts = {"num_groups": started.num_groups, "total_steps": started.total_steps, **asdict(started.config)}
        self._client.log_batch(self._run_id, params=[Param(name, str(value)) for name, value in _flat(facts)])

    def write(self, steps: Sequence[Step]) -> None:
        from mlflow.entities import Metric

        steps_per_batch = METRICS_PER_BATCH // max(len(step.metrics) for step in steps)
        for start in range(0, len(steps), steps_per_batch):  # MLflow takes a batch completely or not at all
            metrics = [
                Metric(name, value, round(step.at * 1000), step.number)
                for step in steps[start : start + steps_per_batch]
                for name, value in step.metrics.items()
            ]
            self._client.log_batch(self._run_id, metrics=metrics)
        self.last_step = steps[-1].number
        self._publish()

    def close(self, status: Status | None) -> None:
        if status is not None:
            self._client.set_terminated(self._run_id, "FINISHED" if status == "succeeded" else "FAILED")
        self._publish()

    def _find(self, options: Mlflow, spec: AttemptSpec) -> str:
        """Returns the id of the job's MLflow run. If no earlier attempt (run of the job) has created the MLflow run,
        creates it, in the experiment and with the name that `options` say."""
        experiment = self._experiment(options.experiment)
        runs = self._client.search_runs(
            [experiment], f"tags.`{JOB_TAG}` = '{spec.job_id}'", order_by=["attributes.start_time ASC"], max_results=1
        )
        if runs:
            run_id = str(runs[0].info.run_id)
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        tags = {JOB_TAG: spec.job_id, "raydpo.fine_tuned_model": spec.fine_tuned_model or ""}
        created = self._client.create_run(experiment, tags=tags, run_name=options.run_name or spec.job_id)
        return str(created.info.run_id)

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        try:
            return str(self._client.create_experiment(name))
        except MlflowException:
            if (existing := self._client.get_experiment_by_name(name)) is None:
                raise
            return str(existing.experiment_id)

    def _link(self, server: str) -> str:
        url = urlsplit(server)
        run = self._client.get_run(self._run_id).info
        if url.scheme not in ("http", "https"):
            return f"run {run.run_id}"
        host = url.netloc.rpartition("@")[2]  # the link must not contain a password
        return f"{url.scheme}://{host}{url.path.rstrip('/')}/#/experiments/{run.experiment_id}/runs/{run.run_id}"

    def _where_local(self, job_id: str) -> str:
        return (
            "the cluster has no MLflow tracking server (MLFLOW_TRACKING_URI is not set), so the run is written to "
            f"runs/{job_id}/mlflow/{self._file.name} in the service's storage; "
            f"see it with `mlflow server --backend-store-uri sqlite:///{self._file.name}`"
        )

    def _publish(self) -> None:
        if self._local:
            storage.write_file(self._uri, self._file)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
