"""Builds the JSON objects of the API for models, and for permissions to use models."""

from dataclasses import asdict
from typing import Any

from services.control_plane.core.responses import seconds
from services.control_plane.core.tables import CheckpointPermission
from services.control_plane.models.models import NamedModel
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


def permission_object(row: CheckpointPermission) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "checkpoint.permission",
        "created_at": seconds(row.created_at),
        "project_id": row.project_id,
    }
