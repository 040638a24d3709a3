"""The JSON objects of projects, API keys, usage and the audit log, as the OpenAPI document describes them.

docs/wire/objects.md says what the fields mean.
"""

from typing import Literal

from typing_extensions import TypedDict

from services.control_plane.settings import Scope


class ProjectDocument(TypedDict):
    id: str
    object: Literal["project"]
    created_at: int
    name: str
    archived_at: int | None
    weight: float
    max_running_jobs: int | None
    max_queued_jobs: int | None
    max_bytes: int | None
    max_accelerator_hours: float | None


class LimitDocument(TypedDict):
    used: float
    limit: float | None


class ProjectUsageDocument(TypedDict):
    object: Literal["project.usage"]
    project_id: str
    jobs: dict[str, int]
    limits: dict[str, LimitDocument]


class KeyDocument(TypedDict):
    id: str
    object: Literal["key"]
    created_at: int
    name: str
    project_id: str
    redacted_value: str
    scopes: list[Scope]
    requests_per_minute: int | None
    tokens_per_minute: int | None
    expires_at: int | None
    revoked_at: int | None
    last_used_at: int | None


class NewKeyDocument(KeyDocument):
    """The JSON object of a new API key. `value` is the key's text; it is null in the answer to a repeated request."""

    value: str | None


UsageDocument = TypedDict(  # `from` is a keyword of Python's
    "UsageDocument",
    {
        "id": str,
        "object": Literal["usage"],
        "group_by": Literal["project", "key", "model", "day"],
        "from": str,
        "to": str,
        "num_requests": int,
        "prompt_tokens": int,
        "completion_tokens": int,
        "accelerator_seconds": float,
    },
)


class AuditDocument(TypedDict):
    id: int
    object: Literal["audit.entry"]
    created_at: int
    project_id: str
    key_id: str
    request_id: str
    action: str
    object_id: str | None
    status: int
    code: str | None
    num_requests: int


class AuditPage(TypedDict):
    """One page of the audit log, whose entries have numbers as ids."""

    object: str
    data: list[AuditDocument]
    has_more: bool
    first_id: int | None
    last_id: int | None
