"""The JSON objects of models, and of permissions to use them, as the OpenAPI document describes them.

docs/wire/objects.md says what the fields mean.
"""

from typing import Any, Literal

from typing_extensions import TypedDict


class ModelExtension(TypedDict):
    root: str
    job: str | None
    kind: Literal["policy", "reward"]
    adapter: dict[str, Any] | Literal["none"]
    quantization: str | None


class ModelDocument(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    x_raydpo: ModelExtension


class PermissionDocument(TypedDict):
    id: str
    object: Literal["checkpoint.permission"]
    created_at: int
    project_id: str
