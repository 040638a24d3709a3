"""The JSON object of a deployment (how a model is served), as the OpenAPI document describes it. docs/wire/objects.md
says what the fields mean."""

from typing import Any, Literal

from typing_extensions import TypedDict


class DeploymentDocument(TypedDict):
    id: str
    object: Literal["deployment"]
    chosen: dict[str, Any]
    settings: dict[str, Any]
    attached_to: str | None
    state: Literal["unloaded", "waiting", "loading", "running", "failed"]
    waits_for: str | None
    error: str | None
    replicas_ready: int
    requests_in_flight: int | None
    tokens_per_second: float | None
    time_to_first_token: float | None
    last_used_at: int | None
    unloads_at: int | None
