"""One attempt of a job, from its spec to the exported policy: `python -m services.training.driver <spec uri>`.

Exit status: 0 after Succeeded, 1 after Failed, 3 when a later attempt has taken over, 4 after Paused, 5 when the
user cancels. An attempt that ends in another way reports Died, if it still can, with a traceback in the log; it is
followed by one that resumes from the last checkpoint.
"""

import importlib
import json
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

import ray
from pydantic import ValidationError
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from services import forkserver, storage
from services.contract import (
    WIRE,
    AttemptAddress,
    AttemptSpec,
    Died,
    Failed,
    Paused,
    Progress,
    Report,
    Succeeded,
    first_error,
)
from services.forkserver.client import preload
from services.training.data.dataset import Data, Dataset
from services.training.data.row_order import num_places
from services.training.data.row_stream import Stream
from services.training.node import local_actor
from services.training.preparation import Prepared, prepare
from services.training.reports.integrations import actors
from services.training.reports.logs import keep_logs
from services.training.reports.reporting import WATCH, JobFailed, Reporter
from services.training.run.commands import PAUSED, Obedience
from services.training.run.deaths import cause_of
from services.training.run.full_disk import when_there_is_room

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "RAYDPO_ATTEMPT_TOKEN"
STATUSES = {"succeeded": 0, "failed": 1, "paused": PAUSED}
TRAINER = "services.training.run.ray_trainer"
WORKERS_IMPORT = (
    "services.training.reports.reporting",
    "services.training.data.encoding",
    "services.training.reference.trainer_scores",
    "ray.data",
    "ray.train",
    "ray.train.torch",
    TRAINER,
    "services.training.run.worker",
)
CLOSE_SECONDS = 30.0
WORKER_FAILURES = 3  # of one attempt; the workers that follow resume from the last checkpoint


def main(spec_uri: str) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs each URL, and some are signed
    written = storage.read_bytes(spec_uri)
    try:
        spec = read_spec(written)
    except JobFailed as failure:
        return refuse(AttemptAddress.model_validate_json(written), failure.report)
    keep_logs(spec.run_uri, spec.attempt, "driver")
    _keep_environment_to_itself()
    ray.init(address="auto", logging_level=logging.WARNING, runtime_env=_runtime_env())
    _in_thread(lambda: importlib.import_module(TRAINER))  # takes two seconds, in which the file is encoded
    reporter = _start_reporter(spec, os.environ[TOKEN_VARIABLE])
    preload(ray.get_runtime_context().get_job_id(), WORKERS_IMPORT)
    followers = actors.start(spec, reporter)
    obedience = Obedience(reporter, followers)
    try:
        outcome = run(spec, reporter)
        obedience.end()
        actors.close(followers, None if outcome.kind == "paused" else outcome.kind, reporter)
        ray.get(reporter.report.remote(outcome))
    except Exception as error:
        reporter.report.remote(Died(cause=cause_of(error)))
        raise
    finally:
        if not when_there_is_room(
            lambda: ray.get(reporter.close.remote(CLOSE_SECONDS)), "the last report", logger.info
        ):
            logger.warning("Not all events were shipped; the control plane finds them in the spool.")
    return STATUSES[outcome.kind]


def read_spec(written: bytes) -> AttemptSpec:
    """Raises JobFailed where another release wrote what this one does not understand."""
    wire = AttemptAddress.model_validate_json(written).wire
    try:
        if wire <= WIRE:
            return AttemptSpec.model_validate_json(written)
        why = f"it is version {wire}, and the cluster's image reads up to {WIRE}"
    except ValidationError as error:
        why = first_error(error)
    message = (
        f"The cluster's image is of another release than the control plane and cannot read the attempt: {why}. "
        "Its operator has to bring both to one release; then submit the job again."
    )
    raise JobFailed(Failed(code="release_mismatch", message=message))


def refuse(address: AttemptAddress, report: Failed) -> int:
    """Tell why this driver does not run the attempt."""
    reporter = Reporter(address, os.environ[TOKEN_VARIABLE])
    reporter.report(report)
    reporter.close(CLOSE_SECONDS)
    logger.error("%s", report.message)
    return STATUSES["failed"]


def run(spec: AttemptSpec, reporter: Any) -> Succeeded | Failed | Paused:
    try:
        return _run(spec, reporter)
    except JobFailed as failure:
        logger.error("%s", failure)
        return failure.report


def _run(spec: AttemptSpec, reporter: Any) -> Succeeded | Failed | Paused:
    """Training begins when its data are prepared, or so much of them that the rest can follow."""

    def report(report: Report) -> None:
        ray.get(reporter.report.remote(report))

    begun = Future[Any]()
    preparing = _in_thread(lambda: _prepare(spec, report, begun))
    wait((preparing, begun), return_when=FIRST_COMPLETED)
    found: Prepared | Stream = begun.result() if begun.done() else preparing.result()
    training = _in_thread(lambda: _train(spec, found, reporter))
    wait((preparing, training), return_when=FIRST_COMPLETED)
    if preparing.done():
        preparing.result()  # what ends it ends training
    trained: Succeeded | Failed | Paused = training.result()
    if not isinstance(trained, Succeeded):
        return trained
    preparing.result()
    report(Progress(stage="exporting", done=0, total=1))
    exported = when_there_is_room(lambda: export(spec, trained), "the policy", report)
    report(Progress(stage="exporting", done=1, total=1))
    return exported


def _prepare(spec: AttemptSpec, report: Callable[[Report], None], begun: "Future[Stream]") -> Prepared:
    def anew() -> Prepared:
        if begun.done():
            raise RuntimeError("Storage was full while workers trained on what was encoded; the next attempt goes on.")
        return prepare(spec, report, begun.set_result)

    prepared = when_there_is_room(anew, "what is prepared", report)
    if begun.done():
        begun.result().finish(prepared.validation)
    return prepared


def _train(spec: AttemptSpec, found: Prepared | Stream, reporter: Any) -> Succeeded | Failed | Paused:
    data = found.training if isinstance(found, Prepared) else found
    num_groups, with_adapter = num_places(data, spec.config.seed), spec.weights.adapter is not None
    spec = spec.model_copy(update={"config": spec.config.resolved(num_groups, with_adapter=with_adapter)})
    if isinstance(found, Prepared):
        return train(spec, found.training, found.validation, reporter)
    validates = spec.validation_uri or spec.validation_share
    return train(spec, found, found if validates else None, reporter)


def train(
    spec: AttemptSpec, data: Data, validation: Dataset | Stream | None, reporter: Any
) -> Succeeded | Failed | Paused:
    """The last checkpoint's policy. Workers publish checkpoints themselves, so Ray Train stores nothing of worth."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from services.training.run.ray_trainer import TellDeaths, Trainer

    def work_here() -> Succeeded | Failed | Paused:
        from services.training.run.worker import work

        return work(spec, data, reporter, validation)

    resources = {"CPU": 1.0} | ({"GPU": spec.num_gpus_per_worker} if spec.num_gpus_per_worker else {})
    with tempfile.TemporaryDirectory(prefix="raydpo-driver-") as folder:
        trainer = Trainer(
            work_here,
            scaling_config=ScalingConfig(
                num_workers=spec.num_workers, use_gpu=bool(spec.num_gpus_per_worker), resources_per_worker=resources
            ),
            run_config=RunConfig(
                name=f"{spec.job_id}-{spec.attempt}",
                storage_path=folder,
                failure_config=FailureConfig(max_failures=WORKER_FAILURES, controller_failure_limit=WORKER_FAILURES),
                callbacks=[TellDeaths(reporter)],
            ),
        )
        trained: Succeeded | Failed | Paused = trainer.fit().return_value
    return trained


def export(spec: AttemptSpec, trained: Succeeded) -> Succeeded:
    uri = storage.join(spec.run_uri, "export")
    with tempfile.TemporaryDirectory(prefix="raydpo-driver-") as folder:
        storage.publish(storage.fetch(trained.model_uri, cache=Path(folder)), uri)
    return Succeeded(model_uri=uri, trained_tokens=trained.trained_tokens)


def _in_thread(work: Callable[[], Any]) -> "Future[Any]":
    """Its end may be awaited, and need not be: the thread dies with the process."""
    future = Future[Any]()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _keep_environment_to_itself() -> None:
    """The attempt's token is the driver's alone, and a worker with an environment of its own starts more slowly."""
    if config := os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR):
        kept = {key: value for key, value in json.loads(config).items() if key != "runtime_env"}
        os.environ[RAY_JOB_CONFIG_JSON_ENV_VAR] = json.dumps(kept)


def _runtime_env() -> dict[str, Any] | None:
    """Of every process that this attempt starts; forks of a server have it from there."""
    if forkserver.VARIABLE in os.environ:
        return None
    # Otherwise OpenMP's threads spin while they wait: a step takes 25 times longer on a busy machine.
    return {"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}}


def _start_reporter(spec: AttemptSpec, token: str) -> Any:
    """The actor lives and dies with the driver."""
    reporter = local_actor(Reporter, concurrency_groups={WATCH: 1}).remote(spec, token)
    ray.get(reporter.flush.remote())
    return reporter


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
