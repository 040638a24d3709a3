"""Rows as OpenAI's client reads them. Times are Unix seconds, integers; what is ours stands in `x_raydpo`."""

import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from services.contract import CheckResult, Integrations, Reading
from services.control_plane.files import TRAINING
from services.control_plane.jobs import wire_metrics
from services.control_plane.models import NamedModel
from services.control_plane.quotas import WAITING, Usage
from services.control_plane.settings import Settings
from services.control_plane.tables import (
    AuditEntry,
    Checkpoint,
    CheckpointPermission,
    Event,
    File,
    Job,
    Key,
    Project,
    Upload,
    UploadPart,
    WebhookEndpoint,
    reading_of,
)


def seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())


def listing(data: Sequence[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """One page; the client asks for the next with `after=last_id`."""
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return {"object": "list", "data": list(data), "has_more": has_more, **ends}


def deleted(kind: str, name: str) -> dict[str, Any]:
    return {"id": name, "object": kind, "deleted": True}


def file_object(row: File) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "file",
        "bytes": row.num_bytes,
        "created_at": seconds(row.created_at),
        "expires_at": seconds(row.expires_at),
        "filename": row.filename,
        "purpose": row.purpose,
        "status": _file_status(row),
        "status_details": row.refusal,
        "x_raydpo": {
            "sha256": row.sha256,
            "report": row.report,
            "checked_bytes": row.num_checked,
            **_reading(reading_of(row)),
        },
    }


def _reading(how: Reading) -> dict[str, Any]:
    return {
        "columns": how.columns or None,
        "invalid_rows": how.invalid_rows.how,
        "max_invalid_share": how.invalid_rows.max_share if how.invalid_rows.how == "drop" else None,
    }


def _file_status(row: File) -> str:
    if row.refusal is not None:
        return "error"
    return "uploaded" if row.purpose == TRAINING and row.report is None else "processed"


def upload_object(row: Upload, state: str, file: File | None) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "upload",
        "bytes": row.num_bytes,
        "created_at": seconds(row.created_at),
        "expires_at": seconds(row.expires_at),
        "filename": row.filename,
        "purpose": row.purpose,
        "status": state,
        "file": file and file_object(file),
    }


def part_object(row: UploadPart) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "upload.part",
        "created_at": seconds(row.created_at),
        "upload_id": row.upload_id,
    }


def check_object(check_id: str, file: File, result: CheckResult | None, *, running: bool = False) -> dict[str, Any]:
    """A file's survey and, where a model was asked, what its check found."""
    error = result.error if result else None
    found = result.report or {} if result else {}
    return {
        "object": "dataset.check",
        "id": check_id,
        "status": "running" if running else "failed" if error else "completed",
        "report": {"survey": file.report, **found},
        "error": error and {"code": error.code, "message": error.message, "param": error.param},
    }


def job_object(row: Job, settings: Settings) -> dict[str, Any]:
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
    # Which the oldest jobs lack; those of another release may hold more than this one knows.
    integrations = Integrations.model_validate(row.spec.get("integrations", {}), extra="ignore")
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
        "integrations": [each.model_dump(mode="json", exclude_none=True) for each in integrations.wandb],
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
        "validation_file": row.spec.get("validation_file"),  # which the oldest jobs lack
        "x_raydpo": {
            "num_workers": row.spec["num_workers"],
            "priority": row.priority,
            "waits_for": row.waits_for,
            "validation_share": row.spec.get("validation_share") or None,
            **_reading(Reading.model_validate(row.spec)),
            "tensorboard": integrations.tensorboard,
            "mlflow": integrations.mlflow and integrations.mlflow.model_dump(exclude_none=True),
            "progress": _progress(row),
        },
    }


def _eta_seconds(row: Job) -> float | None:
    """At the rate of the stage so far; None while there is none."""
    progress = (row.observed == "running" and row.progress) or {}
    done = progress.get("done", 0) - progress.get("start", 0)
    if done <= 0 or progress["total"] <= 0:
        return None
    left = (progress["at"] - progress["since"]) / done * (progress["total"] - progress["done"])
    return max(0.0, float(left - (time.time() - progress["at"])))


def _progress(row: Job) -> dict[str, Any] | None:
    if row.progress is None or row.observed != "running":
        return None
    found = {key: row.progress.get(key) for key in ("stage", "done", "total", "encoding")}
    return found | {"eta_seconds": _eta_seconds(row)}


def _estimated_finish(row: Job) -> int | None:
    """Known once training runs: earlier stages tell nothing of its length."""
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


def model_object(model: NamedModel, settings: Settings) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "model",
        "created": seconds(model.created_at),
        "owned_by": settings.organization,
        "x_raydpo": {"root": model.root, "job": model.job_id},
    }


def key_object(row: Key) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "key",
        "created_at": seconds(row.created_at),
        "name": row.name,
        "project_id": row.project_id,
        "redacted_value": f"rd-…{row.hint}",
        "scopes": row.scopes,
        "requests_per_minute": row.requests_per_minute,
        "expires_at": seconds(row.expires_at),
        "revoked_at": seconds(row.revoked_at),
        "last_used_at": seconds(row.last_used_at),
    }


LIMITS = ("max_running_jobs", "max_queued_jobs", "max_bytes", "max_accelerator_hours")


def project_object(row: Project) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "project",
        "created_at": seconds(row.created_at),
        "name": row.name,
        "archived_at": seconds(row.archived_at),
        "weight": row.weight,
        **{limit: getattr(row, limit) for limit in LIMITS},
    }


def usage_object(project: Project, usage: Usage) -> dict[str, Any]:
    """What is used of each limit; a limit of null is none."""
    waiting = sum(usage.jobs[state] for state in WAITING)
    used = (usage.jobs["running"], waiting, usage.num_bytes, round(usage.accelerator_hours, 6))
    return {
        "object": "project.usage",
        "project_id": project.id,
        "jobs": usage.jobs,
        "limits": {
            name: {"used": value, "limit": getattr(project, name)} for name, value in zip(LIMITS, used, strict=True)
        },
    }


def audit_object(row: AuditEntry) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "audit.entry",
        "created_at": seconds(row.created_at),
        "project_id": row.project_id,
        "key_id": row.key_id,
        "request_id": row.request_id,
        "action": row.action,
        "object_id": row.object_id,
        "status": row.status,
        "code": row.code,
        "num_requests": row.num_requests,
    }


def permission_object(row: CheckpointPermission) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "checkpoint.permission",
        "created_at": seconds(row.created_at),
        "project_id": row.project_id,
    }


def webhook_object(row: WebhookEndpoint, *, with_secret: bool = False) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "webhook_endpoint",
        "created_at": seconds(row.created_at),
        "updated_at": seconds(row.updated_at or row.created_at),
        "name": row.name,
        "url": row.url,
        "event_types": row.event_types,
        "signing_secret_hint": f"whsec_…{row.secret[-4:]}",
        **({"signing_secret": row.secret} if with_secret else {}),
        "x_raydpo": {"disabled_at": seconds(row.disabled_at)},
    }
