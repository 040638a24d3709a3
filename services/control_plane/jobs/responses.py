"""Builds the JSON objects of the API for jobs, events and checkpoints."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dpo_core.config import Lora
from dpo_core.methods import COMMON
from dpo_core.options import LOSS
from services.control_plane.core.responses import seconds
from services.control_plane.core.tables import (
    Checkpoint,
    Event,
    Job,
)
from services.control_plane.files.responses import reading_fields
from services.control_plane.jobs.jobs import wire_metrics
from services.control_plane.jobs.requests import EXTENSIONS
from services.control_plane.settings import Settings

OF_X_RAYDPO = sorted(EXTENSIONS)


def job_object(row: Job, settings: Settings, evaluations: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Returns the JSON object of a job. `evaluations` are the JSON objects of the evaluations that the job has asked
    for so far.
    """
    resolved = (row.training or {}).get("config")
    config = resolved or row.spec["config"]
    objective = dict(config["objective"])
    kind = objective.pop("type")
    schedule = {
        "n_epochs": config["n_epochs"] or "auto",
        "batch_size": config["batch_size"] or "auto",
        "learning_rate_multiplier": row.spec["config"]["optim"]["learning_rate_multiplier"] or "auto",
    }
    hyperparameters = {**objective, **schedule}
    # The spec is shown as it is stored, because another release may have stored values that this release refuses.
    weights, integrations = ({**row.spec.get(name, {})} for name in ("weights", "integrations"))  # the oldest have none
    adapter, mlflow = weights.get("adapter"), integrations.get("mlflow")
    wandb = [{**each, "wandb": _without_none(each["wandb"])} for each in integrations.get("wandb", ())]
    how = reading_fields(row.spec)
    asked = {
        "num_workers": row.spec["num_workers"],
        "adapter": {"type": "lora", **asdict(Lora()), **adapter} if adapter else "none",
        "precision": weights.get("precision", "float32"),
        "quantization": weights.get("quantization"),
        "priority": row.priority,
        "validation_share": row.spec.get("validation_share") or None,
        **_selection(row),
        "tensorboard": integrations.get("tensorboard", False),
        "mlflow": mlflow and _without_none(mlflow),
    }
    if rate := config["optim"]["learning_rate"]:
        hyperparameters["learning_rate"] = rate
    return {
        "id": row.id,
        "object": "fine_tuning.job",
        "created_at": seconds(row.created_at),
        "error": row.error,
        "estimated_finish": _estimated_finish(row),
        "fine_tuned_model": row.fine_tuned_model,
        "finished_at": seconds(row.finished_at),
        "hyperparameters": schedule,
        "integrations": wandb,
        "metadata": row.spec["metadata"],
        "method": {"type": kind, kind: {"hyperparameters": hyperparameters}},
        "model": row.spec["model"],
        "organization_id": settings.organization,
        "result_files": [row.result_file] if row.result_file else [],
        "seed": config["seed"],
        "status": row.observed,
        "trained_tokens": row.trained_tokens,
        "training_file": row.spec["training_file"],
        "user_provided_suffix": row.spec["suffix"],
        "validation_file": row.spec.get("validation_file"),  # the oldest jobs lack this field
        "x_raydpo": {
            **asked,
            **how,
            "reference": {
                "source": row.spec.get("reference_source", "auto"),
                "model": row.spec.get("reference_model") or row.spec["model"],
            },
            "evaluations": list(evaluations),
            "waits_for": row.waits_for,
            "progress": _progress(row),
            "request": _request(row.spec, wandb, asked, how),
        },
    }


def _request(
    spec: dict[str, Any], wandb: list[dict[str, Any]], asked: dict[str, Any], how: dict[str, Any]
) -> dict[str, Any]:
    """Returns the request body that would create this job again, with the seed that was drawn for this job.

    `spec` is the job's stored spec. `wandb` are the job's integrations, `asked` its options in `x_raydpo`, and `how`
    its options for reading rows, in the form that the job's JSON object has them.
    """
    config = {**spec["config"], **spec["config"]["optim"]}
    kind = config["objective"]["type"]
    hyperparameters = {**config["objective"], **{name: config[name] for name in COMMON}, "type": None}
    extension = {name: config.get(name) for name in OF_X_RAYDPO} | asked
    extension["evaluations"] = spec.get("evaluations") or None
    reference = {"source": spec.get("reference_source", "auto"), "model": spec.get("reference_model")}
    extension["reference"] = _without_none(reference)
    if "://" in spec["training_file"]:
        extension |= {"dataset": spec["training_file"], **how}
    body = {
        **{name: spec.get(name) for name in ("model", "training_file", "validation_file", "suffix", "metadata")},
        "seed": config["seed"],
        "method": {"type": kind, kind: {"hyperparameters": _without_none(hyperparameters)}},
        "integrations": wandb or None,
        "x_raydpo": _without_none(extension),
    }
    return _without_none(body)


def _without_none(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _selection(row: Job) -> dict[str, Any]:
    """Returns the job's options for keeping checkpoints, and for choosing the checkpoint that becomes its model.

    The oldest jobs lack these options: they kept all checkpoints, and the last one became the model.
    """
    spec, config = row.spec, row.spec["config"]
    validates = spec.get("validation_file") or spec.get("validation_share")
    return {
        "keep_checkpoints": spec.get("keep_checkpoints", "all"),
        "best_metric": config.get("best_metric", LOSS) if validates else None,
        "early_stop": config.get("early_stop"),
        "policy": spec.get("policy", "last"),
    }


def _eta_seconds(row: Job) -> float | None:
    """Returns how many seconds the job's current stage, such as training, will still take if its speed stays the same.
    Returns None if the speed is unknown.
    """
    progress = (row.observed == "running" and row.progress) or {}
    done = progress.get("done", 0) - progress.get("start", 0)
    if done <= 0 or progress["total"] <= 0:
        return None
    left = (progress["at"] - progress["since"]) / done * (progress["total"] - progress["done"])
    return max(0.0, float(left - (time.time() - progress["at"])))


def _progress(row: Job) -> dict[str, Any] | None:
    if row.progress is None or row.observed != "running":
        return None
    shown = {key: row.progress.get(key) for key in ("stage", "done", "total", "encoding")}
    return shown | {"eta_seconds": _eta_seconds(row)}


def _estimated_finish(row: Job) -> int | None:
    """Returns the Unix time at which training will end. Returns None before training has begun, because the speed of
    training is not known yet.
    """
    progress = _progress(row) or {}
    eta = progress.get("eta_seconds") if progress.get("stage") == "training" else None
    return None if eta is None else int(time.time() + eta)


def event_object(row: Event) -> dict[str, Any]:
    return {
        "id": row.public_id,
        "object": "fine_tuning.job.event",
        "created_at": seconds(row.created_at),
        "level": row.level,
        "message": row.message,
        "type": row.type,
        "data": row.data,
    }


def checkpoint_object(row: Checkpoint) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": seconds(row.created_at),
        "fine_tuned_model_checkpoint": row.model_id,
        "fine_tuning_job_id": row.job_id,
        "step_number": row.step,
        "metrics": {"step": row.step, **wire_metrics(row.metrics)},
    }
