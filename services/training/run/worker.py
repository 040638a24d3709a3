"""Runs one training worker: runs the training loop of `dpo_core`, reports each step, and copies checkpoints to
storage."""

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from dpo_core.checkpoint_selection import Evaluation, best, stalls
from dpo_core.encoding.encode import EncodedGroup
from dpo_core.models.model import load_tokenizer
from dpo_core.training.checkpoint import DamagedCheckpoint, read_manifest, verify
from dpo_core.training.ranks import all_reduce_min
from dpo_core.training.trainer import StepResult, train
from services import storage
from services.contract import (
    AttemptSpec,
    CheckpointSaved,
    Failed,
    Message,
    Paused,
    Progress,
    Report,
    Started,
    StepMetrics,
    Succeeded,
)
from services.training import policies
from services.training.data.dataset import Data, Dataset
from services.training.data.row_order import Read, batched, global_batches, num_places, num_steps, read_in_order
from services.training.data.row_reader import Rows
from services.training.data.row_stream import Stream
from services.training.reports.logs import keep_logs
from services.training.reports.reporting import JobFailed
from services.training.run import stored_checkpoints
from services.training.run.commands import pause_requests
from services.training.run.unavailable_storage import retry_while_unavailable

logger = logging.getLogger(__name__)

LN2_TOLERANCE = 1e-3
GROUPS_PER_EVALUATION = 256  # groups that are read at a time, and divided among all workers


def work(
    spec: AttemptSpec, data: Data, reader: Any, reporter: Any, validation: Dataset | Stream | None = None
) -> Succeeded | Failed | Paused:
    """Runs one training worker until the last step, until a failure that only the user can fix, or until a pause.
    Returns the last report of the attempt (one run of the job).

    On success, the report names the checkpoint that becomes the policy (the trained model). A pause leaves a
    checkpoint. The config of `spec` must have no undecided options. `reader` is the handle of the attempt's RowReader,
    a Ray actor that reads the prepared data for all workers. `reporter` is the handle of the attempt's Reporter; only
    rank 0 (the first worker) sends reports to it. Every checkpoint is evaluated on the groups (prompts with their
    completions) in `validation`; None means no evaluations.
    """
    try:
        with policies.unusable_models_fail_the_job():
            return _work(spec, data, reader, reporter, validation)
    except JobFailed as failure:
        return failure.report


def _work(
    spec: AttemptSpec, data: Data, reader: Any, reporter: Any, validation: Dataset | Stream | None
) -> Succeeded | Failed | Paused:
    keep_logs(spec.run_uri, spec.attempt, f"worker-{dist.get_rank()}")
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(_num_threads(device))
    report = reporter.report.remote if dist.get_rank() == 0 else logger.info
    rows = Rows(reader, partial(retry_while_unavailable, what="reading the data", report=report))
    num_groups = num_places(data, spec.config.seed)
    total_steps = num_steps(num_groups, spec.config)
    with _scratch(spec) as scratch, pause_requests(reporter) as should_pause:
        resume = _agree_on_checkpoint(spec, scratch, reporter, device)
        step, num_tokens, evaluations = 0, 0, tuple[Evaluation, ...]()
        if resume:
            manifest = read_manifest(resume)
            step, num_tokens, evaluations = manifest.step, manifest.num_tokens, manifest.evaluations
        if dist.get_rank() == 0:
            started = Started(config=spec.config, num_groups=num_groups, total_steps=total_steps)
            _warn_of_slow_precision(spec, device, reporter)
            _report_start(started.model_copy(update={"resumed_from": step}), resume, spec, reporter)
        results = train(
            spec.config,
            policies.load_policy(spec, device),
            load_tokenizer(storage.fetch(spec.model_source)),
            lambda after_step: global_batches(data, spec.config, after_step=after_step, read=rows.outlines),
            total_steps=total_steps,
            checkpoint_dir=scratch / "checkpoints",
            resume=resume,
            publish=lambda step, folder: _publish(step, folder, spec, reporter),
            validation=held_out(validation, rows.outlines),
            stop=should_pause,
            load_ids=rows.load,
        )
        failed = None
        for result in results:
            step, num_tokens, evaluations = result.step, result.num_tokens, result.evaluations
            if not result.metrics:
                continue  # the step had no groups
            if failed := failure_of(result, spec):
                break
            if dist.get_rank() == 0:
                _report_step(result, spec, reporter)
    over = not failed and (step == total_steps or stalls(evaluations, spec.config.best_metric, spec.config.early_stop))
    if dist.get_rank() == 0:
        for sentence in explain_end(step, total_steps, evaluations, spec) if over else ():
            reporter.report.remote(sentence)
        ray.get(reporter.flush.remote())  # all reports are stored before the driver reports the end
    if not over:
        return failed or Paused(step=step)
    model_uri = storage.join(checkpoint_uri(spec, step_of_policy(step, evaluations, spec)), "model")
    return Succeeded(model_uri=model_uri, trained_tokens=num_tokens)


def step_of_policy(last: int, evaluations: Sequence[Evaluation], spec: AttemptSpec) -> int:
    """Returns the step of the checkpoint that becomes the policy (the trained model).

    If the user asked for the best checkpoint and there are evaluations, this is the step with the best evaluation.
    Otherwise it is `last`, the last step of training.
    """
    top = best(evaluations, spec.config.best_metric) if spec.policy == "best" else None
    return top.step if top else last


def explain_end(last: int, total_steps: int, evaluations: Sequence[Evaluation], spec: AttemptSpec) -> list[Message]:
    """Returns messages for the user about the end of training after the step `last`, of `total_steps` planned steps.
    `evaluations` are the run's evaluations.

    If the user asked for an early stop or the best checkpoint, the messages name the reason for the end and the chosen
    checkpoint. If not, there are no messages.
    """
    found, metric, early_stop = [], spec.config.best_metric, spec.config.early_stop
    if early_stop and last < total_steps:
        gain = f"by {early_stop.min_gain:g}" if early_stop.min_gain else "at all"
        why = f"{metric} has not improved {gain} in {early_stop.patience} evaluations"
        found.append(Message(message=f"Stopped early after step {last}: {why}."))
    if top := best(evaluations, metric):
        if spec.policy == "best":
            why = f"{metric} {top.value:.6g} is the best of {len(evaluations)} evaluations"
            found.append(Message(message=f"The job's policy is the checkpoint of step {top.step}, whose {why}."))
    elif spec.policy == "best" or early_stop:
        what = f"No checkpoint has a value of {metric}, so the job could not stop early or choose the best checkpoint"
        found.append(Message(level="warn", message=f"{what}; its policy is the last checkpoint, of step {last}."))
    return found


def held_out(
    validation: Dataset | Stream | None, read: Read
) -> Callable[[], Iterator[list[EncodedGroup]] | None] | None:
    """Returns a function that reads the validation data in batches, for the training loop. Returns None instead of a
    function if the job has no validation data. `read` reads the groups (prompts with their completions), or only their
    outlines (the groups without their token ids).

    If the data are a Stream (still being encoded), a call of the function first waits until the groups held out for
    validation are known. The call returns None if no groups are held out.
    """
    if validation is None:
        return None

    def read_batches() -> Iterator[list[EncodedGroup]] | None:
        dataset = validation.held_out() if isinstance(validation, Stream) else validation
        return batched(read_in_order(dataset, read), GROUPS_PER_EVALUATION) if dataset else None

    return read_batches


def failure_of(result: StepResult, spec: AttemptSpec) -> Failed | None:
    """Returns the failure with which training must end after the step of `result`, or None if training can go on.

    Metrics are the same on all workers, so all workers decide the same.
    """
    loss = result.metrics["loss"]
    for key, value in result.metrics.items():
        if not math.isfinite(value):
            if result.step == 1:
                sentence = f"The metric {key} is {value} at step 1, before any training; check the model and the data."
                return Failed(code="training_diverged", message=sentence)
            rate = result.metrics["lr"]
            what = f"The metric {key} is {value} at step {result.step}, where the learning rate is {rate:.3g}"
            sentence = f"{what}; lower the learning rate."
            return Failed(code="training_diverged", message=sentence, param="hyperparameters")
    if starts_at_ln2(result, spec) and abs(loss - math.log(2)) > LN2_TOLERANCE:
        sentence = (
            f"The first loss is {loss:.6f}, but must be ln 2 = {math.log(2):.6f} (within {LN2_TOLERANCE}), because the "
            f"policy and its reference model {spec.reference or spec.reference_model} are equal at the start; use the "
            "same weights for both, in float32."
        )
        return Failed(code="reference_mismatch", message=sentence)
    return None


def starts_at_ln2(result: StepResult, spec: AttemptSpec) -> bool:
    """Whether the loss of the step in `result` must be ln 2. It must be ln 2 at the first step of DPO if the policy
    still computes the same as the reference.

    Policy and reference differ at the first step if the reference is another model, if an adapter's dropout is on, or
    if bfloat16 rounds their numbers differently.
    """
    adapter, precision = spec.weights.adapter, spec.weights.precision
    drops = adapter is not None and adapter.dropout > 0
    exact = "bfloat16" not in (precision, spec.reference_dtype)
    equal = spec.reference_model_source is None and not drops and exact
    return result.step == 1 and spec.config.objective.type == "dpo" and equal


def newest_checkpoint(run_uri: str, cache: Path, report: Callable[[Report], None]) -> str | None:
    """Finds the newest checkpoint from which training can resume, downloads it to the folder `cache`, and returns its
    URI. Returns None if there is no such checkpoint. `run_uri` is the job's folder in storage.

    Training can resume from a checkpoint that is complete and undamaged and has the optimizer's state. A damaged
    checkpoint is reported to the user.
    """
    for _, uri in stored_checkpoints.complete(run_uri):
        try:
            if not stored_checkpoints.manifest_of(uri).has_optimizer:
                continue
            folder = storage.fetch(uri, cache)
            verify(folder)
        except DamagedCheckpoint as error:
            report(
                Message(level="warn", message=(f"A damaged checkpoint is skipped, and an older one is tried: {error}"))
            )
        else:
            return uri
    return None


def _agree_on_checkpoint(spec: AttemptSpec, cache: Path, reporter: Any, device: torch.device) -> Path | None:
    """Chooses the checkpoint from which all workers resume, downloads it to the folder `cache`, and returns its local
    folder. Returns None if there is no checkpoint.

    Rank 0 (the first worker) chooses the newest checkpoint that can be used, and tells the other workers. It reports
    damaged checkpoints to the user through `reporter`.
    """
    choice: list[str | None] = [None]
    if dist.get_rank() == 0:
        choice = [newest_checkpoint(spec.run_uri, cache, reporter.report.remote)]
    dist.broadcast_object_list(choice, src=0, device=device)
    return storage.fetch(choice[0], cache) if choice[0] else None


def _warn_of_slow_precision(spec: AttemptSpec, device: torch.device, reporter: Any) -> None:
    """Warns the user, through `reporter`, if training computes in bfloat16 on a CPU without AMX instructions.

    On such a CPU, products in bfloat16 are up to 60 times slower than in float32.
    """
    fast = device.type != "cpu" or torch.cpu._is_amx_tile_supported()
    if spec.weights.precision == "bfloat16" and not fast:
        sentence = (
            "bfloat16 is slower than float32 on this CPU (it has no AMX); "
            "send x_raydpo.precision 'float32' to train faster."
        )
        reporter.report.remote(Message(level="warn", message=sentence))


def _report_start(started: Started, resume: Path | None, spec: AttemptSpec, reporter: Any) -> None:
    reporter.report.remote(started)
    reporter.report.remote(Progress(stage="loading policy", done=0, total=0))
    if resume:
        step = started.resumed_from
        reporter.report.remote(Message(message=f"Training resumes from the checkpoint of step {step}."))
        # The attempt that saved the checkpoint may have died before its report of the checkpoint was spooled.
        metrics = read_manifest(resume).metrics
        saved = CheckpointSaved(step=step, uri=checkpoint_uri(spec, step), metrics=metrics)
        reporter.report.remote(saved)


def _report_step(result: StepResult, spec: AttemptSpec, reporter: Any) -> None:
    if starts_at_ln2(result, spec):
        sentence = (
            f"The first loss is {result.metrics['loss']:.6f}, which is ln 2, "
            "so policy and reference model agree as they must."
        )
        reporter.report.remote(Message(message=sentence))
    metrics = StepMetrics(step=result.step, total_steps=result.total_steps, metrics=result.metrics)
    reporter.report.remote(metrics)
    if result.warning:
        reporter.report.remote(Message(level="warn", message=result.warning))


def _publish(step: int, folder: Path, spec: AttemptSpec, reporter: Any) -> None:
    """Copies this worker's files of the checkpoint of step `step` from the local `folder` to storage, while training
    goes on. Afterwards deletes `folder`.

    Rank 0 (the first worker) copies after all other workers. Before it copies, it has `reporter` store all reports so
    far; after it has copied, it reports the checkpoint. If this process dies while it copies, neither a report nor the
    checkpoint is lost.
    """
    uri = checkpoint_uri(spec, step)

    def publish() -> None:
        if dist.get_rank() == 0:
            ray.get(reporter.flush.remote())  # an attempt that resumes here does not report these steps again
        storage.publish(folder, uri)

    metrics = read_manifest(folder).metrics if dist.get_rank() == 0 else {}
    retry_while_unavailable(publish, f"publishing the checkpoint at step {step}", reporter.report.remote)
    shutil.rmtree(folder)
    if dist.get_rank() == 0:
        reporter.report.remote(CheckpointSaved(step=step, uri=uri, metrics=metrics))
        _drop_optimizers(step, spec, reporter)


def _drop_optimizers(published: int, spec: AttemptSpec, reporter: Any) -> None:
    """Removes the optimizer's state from older checkpoints, from which no job resumes. `published` is the step of the
    newest checkpoint.

    A failure does not stop training: the user is warned through `reporter`, and the removal is tried again after the
    next checkpoint.
    """
    try:
        stored_checkpoints.drop_optimizers(spec.run_uri, published=published)
    except (OSError, DamagedCheckpoint) as error:
        sentence = f"The optimizer state of older checkpoints could not be removed and is tried again later: {error}"
        reporter.report.remote(Message(level="warn", message=sentence))


def checkpoint_uri(spec: AttemptSpec, step: int) -> str:
    return stored_checkpoints.checkpoint_uri(spec.run_uri, step)


@contextmanager
def _scratch(spec: AttemptSpec) -> Iterator[Path]:
    """Yields a temporary folder for this worker on its node.

    First removes the folders of this job's earlier attempts (runs) that were killed, because such folders may be large.
    """
    prefix = f"raydpo-{spec.job_id}-{dist.get_rank()}-"
    for abandoned in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix) as folder:
        yield Path(folder)


def _num_threads(device: torch.device) -> int:
    """Returns the number of CPU threads of each worker: the smallest share of a node's cores that a worker of the job
    has. Ray itself would set one thread, for the one CPU that a worker reserves. All workers must call this.

    All workers use this number, because the bits of a sum depend on the number of threads. So a job computes the same
    if its workers are distributed among nodes in another way, as long as the smallest share stays. More threads of one
    worker would not make steps faster, because each step ends with the slowest worker.

    The number of the node's cores is the smaller of two numbers: the CPUs that Ray counts, and the cores of the
    machine. Ray may count fewer CPUs, because a container may have fewer CPUs than its machine. The machine may have
    fewer cores, because Ray may be configured with more CPUs than exist.
    """
    node_id = ray.get_runtime_context().get_node_id()
    logical = next(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["NodeID"] == node_id)
    num_workers: int = ray.train.get_context().get_local_world_size()
    return all_reduce_min(max(1, min(os.cpu_count() or 1, int(logical)) // num_workers), device)
