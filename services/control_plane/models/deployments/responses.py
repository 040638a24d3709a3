"""Builds the API's JSON object of a deployment (how a model is served)."""

from typing import Any

from services.control_plane.models.deployments.deployments import Status
from services.control_plane.ray_api import Load


def deployment_object(status: Status, load: Load | None) -> dict[str, Any]:
    """Returns the API's JSON object of a deployment (how a model is served), from its `status`: the settings that a
    client chose, all settings, the state and the load.

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
        "last_used_at": status.last_used_at and int(status.last_used_at.timestamp()),
        "unloads_at": status.unloads_at and int(status.unloads_at.timestamp()),
    }
