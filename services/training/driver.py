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
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import ray
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from services import storage
from services.contract import AttemptSpec, Failed, Message, Progress, Report, Succeeded
from services.training import dataset, source
from services.training.dataset import DamagedPart, Dataset
from services.training.encoding import Encoded, Piece, encode, encode_piece
from services.training.reporting import JobFailed, Reporter
from services.training.scoring import await_reference, score

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
    _stop_on_sigterm(reporter)
    status = 0
    try:
        ray.get(reporter.report.remote(run(spec, reporter)))
    except JobFailed as failure:
        logger.error("%s", failure)
        ray.get(reporter.report.remote(failure.report))
        status = FAILED
    finally:
        if not ray.get(reporter.close.remote(CLOSE_SECONDS)):
            logger.warning("Not all events were shipped; the control plane finds them in the spool.")
    return status


def run(spec: AttemptSpec, reporter: Any) -> Succeeded:
    def report(report: Report) -> None:
        ray.get(reporter.report.remote(report))

    data = prepare(spec, report)
    spec = spec.model_copy(update={"config": spec.config.resolved(data.num_groups)})
    trained = train(spec, data, reporter)
    report(Progress(stage="exporting", done=0, total=1))
    exported = export(spec, trained)
    report(Progress(stage="exporting", done=1, total=1))
    return exported


def prepare(spec: AttemptSpec, report: Callable[[Report], None]) -> Dataset:
    """The data of an earlier attempt, or encoded and scored now."""
    uri = storage.join(spec.run_uri, "prepared")
    try:
        if found := dataset.find(uri):
            return found
    except DamagedPart as error:
        report(Message(level="warn", message=f"Prepared data are damaged and made again: {error}"))
    own = storage.join(uri, str(spec.attempt))  # an attempt that does not know yet that it is fenced writes elsewhere
    encoded_uri = storage.join(own, "encoded")
    with source.as_plain_file(spec, storage.join(own, "source"), report) as plain:
        data = encode(plain, encoded_uri, lambda pieces: _encode_pieces(plain, encoded_uri, pieces), report)
    source.check_margins(spec, data)
    if reference := spec.reference:
        data = score(data, storage.join(own, "scored"), lambda: await_reference(reference, report), report)
        storage.delete(encoded_uri)
    dataset.save(data, uri)
    return data


def _encode_pieces(spec: AttemptSpec, folder_uri: str, pieces: list[Piece]) -> Iterator[Encoded]:
    """By Ray Data, in the order in which they get done."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    # Not by Ray's logical CPUs: each process loads a tokenizer, and more of them than real cores only wait.
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    size = min(len(pieces), num_nodes * (os.cpu_count() or 1))

    def encode_row(row: dict[str, str]) -> dict[str, str]:
        encoded = encode_piece(spec, folder_uri, Piece.model_validate_json(row["piece"]))
        return {"encoded": encoded.model_dump_json()}

    items = [{"piece": piece.model_dump_json()} for piece in pieces]
    rows = ray.data.from_items(items, override_num_blocks=len(items))
    for row in rows.map(encode_row, compute=ray.data.TaskPoolStrategy(size=size)).iter_rows():
        yield Encoded.model_validate_json(row["encoded"])


def train(spec: AttemptSpec, data: Dataset, reporter: Any) -> Succeeded:
    """The last checkpoint's policy. Workers publish checkpoints themselves, so Ray Train stores nothing of worth."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    def work_here() -> Succeeded | Failed:
        from services.training.worker import work

        return work(spec, data, reporter)

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


def _stop_on_sigterm(reporter: Any) -> None:
    """SIGTERM ends the attempt; a fenced attempt sends it to itself."""
    fenced = threading.Event()

    def stop(signum: int, frame: FrameType | None) -> None:
        logger.warning("Stopping: %s.", "a later attempt has taken over" if fenced.is_set() else "SIGTERM")
        try:
            ray.get(reporter.close.remote(STOP_SECONDS), timeout=2 * STOP_SECONDS)
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
