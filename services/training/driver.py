"""One attempt of a job, from its spec to the exported policy: `python -m services.training.driver <spec uri>`.

Exit status: 0 after Succeeded, 1 after Failed, 3 when a later attempt has taken over. An attempt that
ends in another way, with a traceback in the log, is followed by one that resumes from the last checkpoint.
"""

import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from services import storage
from services.contract import AttemptSpec, Failed, Progress, Report, Succeeded
from services.training.dataset import Data, Dataset
from services.training.integrations import actors
from services.training.order import num_places
from services.training.preparation import Prepared, prepare
from services.training.reporting import JobFailed, Reporter
from services.training.stream import Stream

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "RAYDPO_ATTEMPT_TOKEN"
FAILED, FENCED = 1, 3
CLOSE_SECONDS = 30.0
STOP_SECONDS = 1.0  # Ray Jobs sends SIGKILL 3 s after SIGTERM
WORKER_FAILURES = 3  # of one attempt; the workers that follow resume from the last checkpoint


def main(spec_uri: str) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs each URL, and some are signed
    spec = AttemptSpec.model_validate_json(storage.read_bytes(spec_uri))
    ray.init(address="auto", logging_level=logging.WARNING, runtime_env={"env_vars": _environment()})
    reporter = _start_reporter(spec, os.environ[TOKEN_VARIABLE])
    followers = actors.start(spec, reporter)
    _stop_on_sigterm(reporter, followers)
    status = 0
    try:
        succeeded = run(spec, reporter)
        actors.close(followers, "succeeded", reporter)
        ray.get(reporter.report.remote(succeeded))
    except JobFailed as failure:
        logger.error("%s", failure)
        actors.close(followers, "failed", reporter)
        ray.get(reporter.report.remote(failure.report))
        status = FAILED
    finally:
        if not ray.get(reporter.close.remote(CLOSE_SECONDS)):
            logger.warning("Not all events were shipped; the control plane finds them in the spool.")
    return status


def run(spec: AttemptSpec, reporter: Any) -> Succeeded:
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
    trained = training.result()
    preparing.result()
    report(Progress(stage="exporting", done=0, total=1))
    exported = export(spec, trained)
    report(Progress(stage="exporting", done=1, total=1))
    return exported


def _prepare(spec: AttemptSpec, report: Callable[[Report], None], begun: "Future[Stream]") -> Prepared:
    prepared = prepare(spec, report, begun.set_result)
    if begun.done():
        begun.result().finish(prepared.validation)
    return prepared


def _train(spec: AttemptSpec, found: Prepared | Stream, reporter: Any) -> Succeeded:
    data = found.training if isinstance(found, Prepared) else found
    spec = spec.model_copy(update={"config": spec.config.resolved(num_places(data, spec.config.seed))})
    if isinstance(found, Prepared):
        return train(spec, found.training, found.validation, reporter)
    validates = spec.validation_uri or spec.validation_share
    return train(spec, found, found if validates else None, reporter)


def train(spec: AttemptSpec, data: Data, validation: Dataset | Stream | None, reporter: Any) -> Succeeded:
    """The last checkpoint's policy. Workers publish checkpoints themselves, so Ray Train stores nothing of worth."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    def work_here() -> Succeeded | Failed:
        from services.training.worker import work

        return work(spec, data, reporter, validation)

    resources = {"CPU": 1.0} | ({"GPU": spec.num_gpus_per_worker} if spec.num_gpus_per_worker else {})
    with tempfile.TemporaryDirectory(prefix="raydpo-driver-") as folder:
        trainer = TorchTrainer(
            work_here,
            scaling_config=ScalingConfig(
                num_workers=spec.num_workers, use_gpu=bool(spec.num_gpus_per_worker), resources_per_worker=resources
            ),
            run_config=RunConfig(
                name=f"{spec.job_id}-{spec.attempt}",
                storage_path=folder,
                failure_config=FailureConfig(max_failures=WORKER_FAILURES, controller_failure_limit=WORKER_FAILURES),
            ),
        )
        trained: Succeeded | Failed = trainer.fit().return_value
    if isinstance(trained, Failed):
        raise JobFailed(trained)
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


def _environment() -> dict[str, str]:
    """Of every process that this attempt starts."""
    address = os.environ.get("RAY_ADDRESS")
    return {
        # Otherwise OpenMP's threads spin while they wait: a step takes 25 times longer on a busy machine.
        "OMP_WAIT_POLICY": "PASSIVE",
        # Ray Train's PlacementGroupCleaner looks for a Ray by itself, and stumbles where it finds two.
        **({"RAY_ADDRESS": address} if address else {}),
    }


def _start_reporter(spec: AttemptSpec, token: str) -> Any:
    """The actor lives and dies with the driver, on its node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    reporter = ray.remote(Reporter).options(num_cpus=0, scheduling_strategy=here).remote(spec, token)
    ray.get(reporter.fenced.remote())
    return reporter


def _stop_on_sigterm(reporter: Any, followers: list[Any]) -> None:
    """SIGTERM ends the attempt; a fenced attempt sends it to itself."""
    fenced = threading.Event()

    def stop(signum: int, frame: FrameType | None) -> None:
        logger.warning("Stopping: %s.", "a later attempt has taken over" if fenced.is_set() else "SIGTERM")
        try:
            closing = [each.close.remote(None, STOP_SECONDS) for each in followers if not fenced.is_set()]
            closing.append(reporter.close.remote(STOP_SECONDS))
            ray.wait(closing, num_returns=len(closing), timeout=2 * STOP_SECONDS)
        finally:
            # Ray Data and Ray Train take longer to say goodbye than SIGKILL waits. Their actors die with the driver.
            os._exit(FENCED if fenced.is_set() else 128 + signum)

    def watch() -> None:
        while not ray.get(reporter.fenced.remote()):
            time.sleep(1)
        fenced.set()
        signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
