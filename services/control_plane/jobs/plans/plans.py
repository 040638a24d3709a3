"""Plans jobs: estimates, before a job is submitted, whether it fits into the memory of its workers."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from math import ceil, inf
from typing import Any, Literal, Protocol

from sqlalchemy.ext.asyncio import AsyncSession

from dpo_core.plan.inputs import Rows, Run, Shapes
from dpo_core.plan.plan import CHANGES, Plan, in_gb, plan
from services.contract import JobSpec, SideJobResult
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.core.store import now
from services.control_plane.core.tables import File
from services.control_plane.jobs.requests import EXTENSIONS
from services.control_plane.models.models import NamedModel
from services.control_plane.models.shapes import model_shapes
from services.control_plane.ray_api import Node, RayApi
from services.control_plane.settings import Settings

DOES_NOT_FIT = "does_not_fit"  # the code of the error of a job that is too large for the cluster
MISFIT_AFTER = timedelta(days=7)  # how long the cluster may be too small for a job that waits; then the job fails
MISFIT_GAP = timedelta(hours=1)  # if nobody looked for so long, the time until then does not count
BYTES_OF_TOKEN = 4  # bytes of text per token, assumed if no check has counted the file's tokens
SETTABLE = [name for name in CHANGES if name in EXTENSIONS]
# Families of models whose memory for activations was measured. For these, plans are right within a tenth.
MEASURED = {"llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "phi3", "olmo2", "gemma2", "gemma3_text"}


def rows_of(file: File | None, counted: SideJobResult | None, spec: JobSpec) -> tuple[Rows, str]:
    """Estimates the rows that the job would train on. Returns a pair:

    - the number of rows, and their lengths in tokens;
    - a phrase that says where these numbers come from.

    `spec` is the job's description. `file` is the uploaded training file, None if there is none. `counted` is the
    result of a check that counted the file's tokens, None if there was no check.
    """
    if file is None or file.report is None:
        half = max(2, spec.config.max_length // 2)
        return Rows(groups=0, prompt=half, completion=half), (
            "the file was not read, so the plan assumes rows as long as max_length"
        )
    groups = max(1, round(file.report["num_groups"] * (1 - spec.validation_share)))
    completions = 1 if file.report["kind"] in ("demonstrations", "unpaired") else 2
    lengths = ((counted and counted.report) or {}).get("tokens", {}).get("lengths")
    if lengths:
        number = max(1, sum(lengths["chosen"]["histogram"].values()))
        answers = [lengths[side]["total"] / number for side in ("chosen", "rejected") if lengths.get(side)]
        rows = Rows(
            groups=groups,
            prompt=ceil(lengths["prompt"]["total"] / number),
            completion=max(1, ceil(sum(answers) / len(answers))),
            completions=completions,
            longest=sum(lengths[side]["longest"] for side in lengths),
        )
        return rows, "token counts come from a check of the file with this model"
    part = max(2, min(file.num_bytes // (BYTES_OF_TOKEN * groups * (1 + completions)), spec.config.max_length // 2))
    how = f"token counts are estimated from the file's {file.num_bytes} bytes, {BYTES_OF_TOKEN} for each token"
    return Rows(groups=groups, prompt=part, completion=part, completions=completions), how


def run_of(spec: JobSpec, rows: Rows, nodes: Sequence[Node], settings: Settings) -> Run:
    """Returns those options of the job that decide how much memory the job needs.

    `rows` holds the number and the lengths of the training rows, and `nodes` the machines of the Ray cluster.
    """
    config, adapter = spec.config.resolved(rows.groups or 10_000), spec.weights.adapter
    assert config.batch_size is not None  # set by `resolved`
    assert config.n_epochs is not None
    most = max((len(node.gpus) for node in nodes), default=0)
    targets = adapter.target_modules if adapter else "all-linear"
    return Run(
        precision=spec.weights.precision,
        adapter=adapter.r if adapter else None,
        dropout=adapter.dropout if adapter else 0.0,
        quantized=spec.weights.quantization is not None,
        targets=None if targets == "all-linear" else targets,
        num_workers=spec.num_workers,
        workers_per_node=most or spec.num_workers,
        sharding=config.sharding,
        activation_checkpointing=config.activation_checkpointing,
        max_length=config.max_length,
        max_tokens_per_pack=config.max_tokens_per_pack,
        batch_size=config.batch_size,
        n_epochs=config.n_epochs,
        rewards=config.objective.traits.num_outputs > 0,
        of_whole_batch=config.objective.traits.needs_whole_batch,
        device=_device(settings),
    )


def _device(settings: Settings) -> Literal["cpu", "cuda"]:
    return "cuda" if settings.num_gpus_per_worker else "cpu"


def room_of(nodes: Sequence[Node], settings: Settings, num_workers: int) -> int | None:
    """Returns how many bytes of memory each of the job's workers has; if they differ, the smallest amount.

    With GPUs, this is the memory of the smallest GPU. With CPUs, it is the memory of the largest machine, divided by
    the number of workers, because Ray fills this machine first. `nodes` are the machines of the Ray cluster. Returns
    None if Ray does not report their memory.
    """
    if _device(settings) == "cuda":
        return min((size for node in nodes for size in node.gpus), default=None)
    return max((node.memory // num_workers for node in nodes), default=None)


def most_of(nodes: Sequence[Node], settings: Settings) -> int | None:
    """Returns how many bytes of memory a worker can have at most on `nodes`, the machines of the Ray cluster.

    Returns None if this is unknown, or the cluster may grow.
    """
    if settings.max_cluster:
        return None
    if _device(settings) == "cuda":
        return max((size for node in nodes for size in node.gpus), default=None)
    return max((node.memory for node in nodes), default=None)


def most_workers(nodes: Sequence[Node], settings: Settings) -> float:
    """Returns the largest number of workers that one job can have on the GPUs that the cluster has or may grow to have.

    Returns infinity if this is unknown, or workers use CPUs. `nodes` are the machines of the Ray cluster.
    """
    if _device(settings) == "cpu" or not nodes:
        return inf
    num_gpus = max(sum(len(node.gpus) for node in nodes), settings.max_cluster.get("GPU", 0))
    return num_gpus // settings.num_gpus_per_worker


def _plan(
    spec: JobSpec,
    start: NamedModel,
    shapes: Shapes,
    rows: Rows,
    nodes: Sequence[Node],
    settings: Settings,
    *,
    room: int | None,
) -> Plan:
    """Returns the plan of the job: its need for memory compared with `room`, and changes of options that make the job
    fit.

    `spec` is the job's description, and `start` the model that the job starts from. `shapes` are the shapes of its
    weights, and `rows` describes the training rows. `nodes` are the machines of the Ray cluster. `room` is the number
    of bytes that a worker has, None if unknown.

    Changes that the service would refuse are left out. With CPUs, a larger number of workers is left out, too, because
    workers share a machine's memory.
    """
    run = run_of(spec, rows, nodes, settings)
    others = {"num_workers"} if run.device == "cpu" else set[str]()
    others |= {"quantization"} if spec.reference_source == "serve" else set()
    return plan(
        shapes,
        run,
        rows,
        room,
        [name for name in SETTABLE if name not in others],
        most_workers(nodes, settings),
        merged_rank=start.adapter.r if start.adapter and spec.weights.adapter is None else None,
    )


async def refuse_hopeless(spec: JobSpec, model: NamedModel, settings: Settings, ray_api: RayApi) -> None:
    """Raises InvalidRequest if the job can never fit into memory: the weights, gradients and optimizer of one worker
    alone need more than the cluster's largest GPU has or, with workers on CPUs, its largest machine.
    """
    try:
        shapes = await model_shapes(model)
        nodes = await ray_api.nodes()
        room = most_of(nodes, settings)
        rows, _ = rows_of(None, None, spec)
        found = _plan(spec, model, shapes, rows, nodes, settings, room=room) if room else None
    except ValueError:
        return  # no plan is possible; the job itself reports the error of the model
    # A model with a `text_config` is loaded in part only, so the plan would be too high.
    if found is None or room is None or found.memory.least <= room or "text_config" in shapes.config:
        return
    held = found.memory
    parts = {name: getattr(held, name) for name in ("weights", "gradients", "masters", "moments")}
    told = ", ".join(f"{name} {in_gb(size)}" for name, size in parts.items() if size)
    if held.loading > sum(parts.values()):
        told = "while it loads the whole model"
    largest = f"the largest {'GPU' if _device(settings) == 'cuda' else 'machine'} of the cluster has {in_gb(room)}"
    what = f"The job cannot fit: each worker needs at least {in_gb(held.least)} of memory ({told}), but {largest}."
    raise InvalidRequest(f"{what} {_remedy(found)}", param=_param(found), code=DOES_NOT_FIT)


class MisfitTimes(Protocol):
    """A row of the database, such as a sweep, whose work may be too large for the cluster. `misfit_since` is the time
    since which the work is too large, and `misfit_seen_at` the time at which this was last found.
    """

    misfit_since: Any  # when the cluster was first found too small; None if it was large enough since
    misfit_seen_at: Any  # when the cluster was last found too small


async def misfits_for_too_long(session: AsyncSession, row: MisfitTimes) -> bool:
    """Stores in `row` that the cluster is too small for the row's work now. Returns True if the cluster has been too
    small for MISFIT_AFTER, so that the work should fail.

    The measured time begins anew if the function was not called for MISFIT_GAP, because the cluster may have been large
    enough meanwhile.
    """
    at = await now(session)
    is_unbroken = row.misfit_seen_at is not None and at - row.misfit_seen_at < MISFIT_GAP
    row.misfit_since = (row.misfit_since if is_unbroken else None) or at
    row.misfit_seen_at = at
    return bool(at - row.misfit_since > MISFIT_AFTER)


def _remedy(found: Plan) -> str:
    if not found.changes:
        return "No setting makes the job fit; choose a smaller model, or ask the operator for workers with more memory."
    return " ".join(change.message for change in found.changes)


def _param(found: Plan) -> str:
    return f"x_raydpo.{found.changes[0].field}" if found.changes else "model"


def _explain_wait(asked: int, workers: float, nodes: Sequence[Node], settings: Settings) -> str:
    """Returns a sentence for the user which says that the job would wait, because the cluster has GPUs for fewer
    workers than the job asks for. `asked` is the number of workers that the job asks for, and `workers` the number for
    which there are GPUs. `nodes` are the machines of the Ray cluster.
    """
    if not workers:
        num_gpus, needed = sum(len(node.gpus) for node in nodes), settings.num_gpus_per_worker
        has = f"{num_gpus} of the {needed:g} GPUs that each worker needs" if num_gpus else "no GPU"
        return f"The cluster now has {has}, so the job would wait; ask the operator for more GPUs."
    what = f"The job asks for {asked} workers, but the cluster has GPUs for {workers:g}, so the job would wait"
    return f"{what}; set num_workers to {workers:g} or less, or ask the operator for more GPUs."


def plan_object(
    spec: JobSpec,
    model: NamedModel,
    shapes: Shapes,
    file: File | None,
    counted: SideJobResult | None,
    nodes: Sequence[Node],
    settings: Settings,
) -> dict[str, Any]:
    """Returns the API's JSON object of a job's plan: whether the job fits, its memory in parts, and changes that help.

    `model` is the model that the job starts from, and `shapes` are the shapes of its weights. `file` is the uploaded
    training file, and `counted` the result of a check that counted its tokens; each may be None. `nodes` are the
    machines of the Ray cluster.
    """
    rows, how = rows_of(file, counted, spec)
    room = room_of(nodes, settings, spec.num_workers)
    workers = most_workers(nodes, settings)
    found = _plan(spec, model, shapes, rows, nodes, settings, room=room)
    waits = spec.num_workers > workers
    held = asdict(found.memory)
    notes = [f"Rows: {how}."]
    if shapes.config.get("model_type") not in MEASURED:
        notes.append(
            f"The memory of activations was not measured for {shapes.config.get('model_type')}; "
            "that of a Llama is assumed."
        )
    if room is None and workers:
        notes.append("Ray does not report how much memory its workers have, so whether the job fits is not known.")
    elif found.fits is False:
        notes.append(_remedy(found))
    if waits:
        notes.append(_explain_wait(spec.num_workers, workers, nodes, settings))
    return {
        "object": "plan",
        "model": spec.model,
        "fits": False if waits else found.fits,
        "num_workers": spec.num_workers,
        "device": "gpu" if found.run.device == "cuda" else "cpu",
        "worker_bytes": room,
        "needed_bytes": held.pop("total"),
        "parts": held,
        "shards": found.shards,
        "max_tokens_per_pack": found.run.max_tokens_per_pack,
        "activation_checkpointing": found.run.activation_checkpointing,
        "rows": asdict(rows),
        "steps": found.steps if rows.groups else None,
        "tokens": found.tokens if rows.groups else None,
        "checkpoint_bytes": found.checkpoint_bytes,
        "changes": [asdict(change) | {"field": f"x_raydpo.{change.field}"} for change in found.changes],
        "notes": notes,
    }
