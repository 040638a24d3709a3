"""Builds the JSON objects of the API for models, deployments, and permissions to use models."""

from dataclasses import asdict
from typing import Any

from services.control_plane.core.responses import seconds
from services.control_plane.core.tables import (
    CheckpointPermission,
)
from services.control_plane.models.deployments import Status
from services.control_plane.models.models import NamedModel
from services.control_plane.ray_api import Load
from services.control_plane.settings import Settings


def model_object(model: NamedModel, settings: Settings) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "model",
        "created": seconds(model.created_at),
        "owned_by": settings.organization,
        "x_raydpo": {
            "root": model.root,
            "job": model.job_id,
            "kind": "reward" if model.num_outputs else "policy",
            "adapter": {"type": "lora", **asdict(model.adapter)} if model.adapter else "none",
            "quantization": model.quantization,
        },
    }


def deployment_object(status: Status, load: Load | None) -> dict[str, Any]:
    """Returns the API's JSON object of a deployment: the settings that a client chose, all settings, the state and the
    load.

    The load (requests in flight, tokens per second) is null if `load` is None, which means unknown.
    """
    application = status.application
    used = {"dtype": application.dtype, "num_gpus": application.num_gpus}
    return {
        "id": status.model_id,
        "object": "deployment",
        "chosen": status.chosen,
        "settings": status.own.model_dump(mode="json") | used,
        "attached_to": status.attached_to,
        "state": status.state,
        "waits_for": status.waits_for,
        "error": status.error,
        "replicas_ready": status.num_ready,
        "requests_in_flight": load and load.requests_in_flight,
        "tokens_per_second": load and round(load.tokens_per_second, 3),
        "time_to_first_token": load and load.time_to_first_token,
    }


def permission_object(row: CheckpointPermission) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "checkpoint.permission",
        "created_at": seconds(row.created_at),
        "project_id": row.project_id,
    }
