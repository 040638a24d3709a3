"""Runs one attempt of a job (one run of it on Ray), from reading its settings to exporting the trained model.

Usage: `python -m services.training.driver <spec uri>`. The exit status says how the attempt ended:

- 0: it sent the report Succeeded
- 1: it sent the report Failed
- 3: a later attempt has taken over
- 4: it sent the report Paused
- 5: the user cancelled the job

If an attempt ends in another way, the driver logs a traceback and tries to send the report Died. The next attempt then
resumes from the last checkpoint.
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
from typing import Any, NoReturn

import ray
from pydantic import ValidationError
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from dpo_core.models import adapter_folder
from services import forkserver, storage
from services.contract import (
    WIRE,
    AttemptAddress,
    AttemptSpec,
    Died,
    Failed,
    Message,
    Paused,
    Progress,
    Report,
    Succeeded,
    first_error,
)
from services.forkserver.client import preload
from services.training.data.dataset import Data, Dataset
from services.training.data.row_order import num_places
from services.training.data.row_reader import start_reader
from services.training.data.row_stream import Stream
from services.training.node import local_actor
from services.training.preparation import Prepared, prepare
from services.training.reports.integrations import actors
from services.training.reports.logs import keep_logs
from services.training.reports.reporting import WATCH, JobFailed, Reporter
from services.training.run.commands import PAUSED, Commands
from services.training.run.deaths import cause_of
from services.training.run.unavailable_storage import retry_while_unavailable

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
WORKER_FAILURES = 3  # most failures of workers in one attempt; new workers resume from the last checkpoint


def main(spec_uri: str) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # httpx logs each URL, and some URLs are signed
    written = storage.read_bytes(spec_uri)
    try:
        spec = read_spec(written)
    except JobFailed as failure:
        return refuse(AttemptAddress.model_validate_json(written), failure.report)
    keep_logs(spec.run_uri, spec.attempt, "driver")
    _hide_environment_from_workers()
    ray.init(address="auto", logging_level=logging.WARNING, runtime_env=_runtime_env())
    _in_thread(lambda: importlib.import_module(TRAINER))  # the import takes two seconds, while the file is encoded
    reporter = _start_reporter(spec, os.environ[TOKEN_VARIABLE])
    preload(ray.get_runtime_context().get_job_id(), WORKERS_IMPORT)
    followers = actors.start(spec, reporter)
    commands = Commands(reporter, followers)
    try:
        outcome = run(spec, reporter)
        commands.stop_handling()
        actors.close(followers, None if outcome.kind == "paused" else outcome.kind, reporter)
        ray.get(reporter.report.remote(outcome))
    except Exception as error:
        reporter.report.remote(Died(cause=cause_of(error)))
        raise
    finally:
        if not retry_while_unavailable(
            lambda: ray.get(reporter.close.remote(CLOSE_SECONDS)), "writing the job's last report", logger.info
        ):
            logger.warning("Some events could not be sent to the control plane, which reads them from storage instead.")
    return STATUSES[outcome.kind]


def read_spec(written: bytes) -> AttemptSpec:
    """Parses `written`, the settings of an attempt (one run of a job) as JSON, and returns the settings.

    Raises JobFailed if this release cannot read the settings, because a control plane of another release wrote them.
    """
    wire = AttemptAddress.model_validate_json(written).wire
    try:
        if wire <= WIRE:
            return AttemptSpec.model_validate_json(written)
        why = f"its format has version {wire}, and the image reads versions up to {WIRE}"
    except ValidationError as error:
        why = first_error(error)
    message = (
        f"The Ray cluster's image has another release than the control plane and cannot read the job: {why}. "
        "The operator must install the same release on both; then submit the job again."
    )
    raise JobFailed(Failed(code="release_mismatch", message=message))


def refuse(address: AttemptAddress, report: Failed) -> int:
    """Tells the control plane why this driver (a job's main program) does not run its attempt (one run of the job) at
    all. `report` says why, and `address` says where the attempt sends its reports. Returns the driver's exit status."""
    reporter = Reporter(address, os.environ[TOKEN_VARIABLE])
    reporter.report(report)
    reporter.close(CLOSE_SECONDS)
    logger.error("%s", report.message)
    return STATUSES["failed"]


def run(spec: AttemptSpec, reporter: Any) -> Succeeded | Failed | Paused:
    """Runs an attempt of a job (one run of it on Ray): prepares the data, trains, and exports the trained model.
    Returns the attempt's last report. `reporter` is the handle of the actor that sends the attempt's reports.

    A failure that only the user can fix is returned as Failed and not raised.
    """
    try:
        return _run(spec, reporter)
    except JobFailed as failure:
        logger.error("%s", failure)
        return failure.report


def _run(spec: AttemptSpec, reporter: Any) -> Succeeded | Failed | Paused:
    """Runs an attempt of a job (one run of it on Ray): prepares the data, trains, and exports the trained model.
    Returns the attempt's last report. Raises JobFailed for a failure that only the user can fix. `reporter` is the
    handle of the actor that sends the attempt's reports.

    Training begins when all data are prepared. If the objective needs no reference model, it may begin earlier, when
    the first rows are prepared.
    """

    def report(report: Report) -> None:
        ray.get(reporter.report.remote(report))

    stream = Future[Any]()
    preparing = _in_thread(lambda: _prepare(spec, report, stream))
    wait((preparing, stream), return_when=FIRST_COMPLETED)
    source: Prepared | Stream = stream.result() if stream.done() else preparing.result()
    training = _in_thread(lambda: _train(spec, source, reporter))
    wait((preparing, training), return_when=FIRST_COMPLETED)
    if preparing.done():
        preparing.result()  # raises the error of the preparation, which ends training, too
    trained: Succeeded | Failed | Paused = training.result()
    if not isinstance(trained, Succeeded):
        return trained
    preparing.result()
    report(Progress(stage="exporting", done=0, total=1))
    exported = retry_while_unavailable(lambda: export(spec, trained, report), "exporting the policy", report)
    report(Progress(stage="exporting", done=1, total=1))
    return exported


def _prepare(spec: AttemptSpec, report: Callable[[Report], None], stream: "Future[Stream]") -> Prepared:
    """Prepares the job's data, and returns where the data are. If storage is full or does not answer, waits.

    If training can begin before all data are prepared, the function gives the future `stream` a Stream as its result.
    Workers can read from this Stream while rows are still being encoded.
    """

    def try_once() -> Prepared:
        if stream.done():
            raise RuntimeError(
                "The storage was full or did not answer while data were prepared during training; "
                "the next attempt goes on from the last checkpoint."
            )
        return prepare(spec, report, stream.set_result)

    prepared = retry_while_unavailable(try_once, "preparing data", report)
    if stream.done():
        stream.result().finish(prepared.validation)
    return prepared


def _train(spec: AttemptSpec, source: Prepared | Stream, reporter: Any) -> Succeeded | Failed | Paused:
    data = source.training if isinstance(source, Prepared) else source
    num_groups, with_adapter = num_places(data, spec.config.seed), spec.weights.adapter is not None
    spec = spec.model_copy(update={"config": spec.config.resolved(num_groups, with_adapter=with_adapter)})
    if isinstance(source, Prepared):
        return train(spec, source.training, source.validation, reporter)
    validates = spec.validation_uri or spec.validation_share
    return train(spec, source, source if validates else None, reporter)


def train(
    spec: AttemptSpec, data: Data, validation: Dataset | Stream | None, reporter: Any
) -> Succeeded | Failed | Paused:
    """Runs the training workers with Ray Train until training ends. Returns the last report of the attempt (one run of
    a job): that it succeeded, failed or paused.

    `data` is the data to train on. Every checkpoint is evaluated on the groups (prompts with their completions) in
    `validation`; None means no evaluations. `reporter` is the handle of the actor that sends the attempt's reports. On
    success, the last report has the URI of the trained model. Workers store checkpoints themselves, so the folder in
    which Ray Train stores its files is only temporary.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from services.training.run.ray_trainer import WAITING, ReportDeaths, Trainer

    reader = start_reader()

    def work_here() -> Succeeded | Failed | Paused:
        from services.training.run.worker import work

        return work(spec, data, reader, reporter, validation)

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
                callbacks=[ReportDeaths(reporter)],
            ),
        )
        ray.get(reporter.report.remote(WAITING))
        try:
            trained: Succeeded | Failed | Paused = trainer.fit().return_value
        finally:
            ray.kill(reader)
    return trained


def export(spec: AttemptSpec, trained: Succeeded, report: Callable[[Report], None]) -> Succeeded:
    """Copies the trained model from its checkpoint to the job's folder `export`. Returns a copy of the report `trained`
    with the new URI. Warns the user if the model is an adapter that has learned nothing.

    Raises JobFailed for an adapter with NaN or infinite weights, because such a model could not answer.
    """
    if storage.exists(storage.join(trained.model_uri, adapter_folder.CONFIG)):
        with tempfile.TemporaryDirectory(prefix="raydpo-driver-") as folder:
            useless = _why_useless(storage.fetch(trained.model_uri, cache=Path(folder)))
        if useless:
            remedy = "Check that the rows differ in quality, and raise learning_rate."
            report(Message(level="warn", message=f"The adapter has learned nothing: {useless}. {remedy}"))
    uri = storage.join(spec.run_uri, "export")
    storage.copy_folder(trained.model_uri, uri)
    return Succeeded(model_uri=uri, trained_tokens=trained.trained_tokens)


def _why_useless(adapter: Path) -> str | None:
    """Returns why the adapter in a local folder seems to have learned nothing; None if it has learned something."""
    from dpo_core.models.adapter import has_learned
    from dpo_core.models.architecture import UnusableModel
    from dpo_core.policy.adapter_effect import read_effect

    effect = read_effect(adapter)
    try:
        if not has_learned(adapter):
            return "it gives every row the log-probabilities of its base"
    except UnusableModel as error:
        raise JobFailed(Failed(code="training_diverged", message=str(error))) from None
    if effect and effect.largest == 0:
        return f"it changes the log-probability of none of the {len(effect.rows)} training rows that were measured"
    return None


def _in_thread(work: Callable[[], Any]) -> "Future[Any]":
    """Calls `work` in a daemon thread, which ends with the process. Returns a future of the result."""
    future = Future[Any]()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _hide_environment_from_workers() -> None:
    """Keeps the environment variables of the driver (the job's main program) from being passed on to training workers.

    The variables hold the secret token of the attempt (one run of the job), and would slow the start of workers.
    """
    if config := os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR):
        without_environment = {key: value for key, value in json.loads(config).items() if key != "runtime_env"}
        os.environ[RAY_JOB_CONFIG_JSON_ENV_VAR] = json.dumps(without_environment)


def _runtime_env() -> dict[str, Any] | None:
    """Returns Ray's runtime environment for every process that this attempt (one run of a job) starts.

    Returns None on a node with a fork server, because processes there inherit the environment of that server.
    """
    if forkserver.VARIABLE in os.environ:
        return None
    # Otherwise OpenMP's waiting threads spin, and a training step takes 25 times longer on a busy machine.
    return {"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}}


def _start_reporter(spec: AttemptSpec, token: str) -> Any:
    """Starts the Ray actor that sends the reports of this attempt (one run of a job), and returns the actor's handle.
    The actor ends with the driver, the job's main program. `token` is the token of the attempt's launch, with which it
    first posts to the control plane."""
    reporter = local_actor(Reporter, concurrency_groups={WATCH: 1}).remote(spec, token)
    ray.get(reporter.flush.remote())
    return reporter


def run_and_end(spec_uri: str) -> NoReturn:
    """Runs the attempt (one run of a job) whose settings are at `spec_uri`, and then ends this process at once, without
    disconnecting from Ray.

    After a disconnect, a thread that still trains or listens to Ray Serve would go on using Ray. Ray would then crash
    the process, and the exit status would be lost. Ray ends the actors of this process in any case.
    """
    try:
        status = main(spec_uri)
    except Exception:
        logger.exception("The attempt ended with an unexpected error")
        status = 1
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    run_and_end(sys.argv[1])
