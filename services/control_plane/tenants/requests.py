"""Defines the request bodies for projects and API keys."""

import time
from typing import Annotated

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
)

from services.control_plane.http.validation import Text
from services.control_plane.settings import Scope

Name = Annotated[str, StringConstraints(max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")]


Limit = Annotated[int, Field(ge=0, lt=2**31)]


class CreateKey(BaseModel):
    """The JSON body of POST /v1/x/keys, which creates an API key: its name, project, scopes (permissions), limits and
    expiry.
    """

    model_config = ConfigDict(extra="forbid")
    name: Name
    project_id: Text | None = None  # None: the caller's own project
    scopes: Annotated[list[Scope], Field(min_length=1)] = ["read", "write", "inference"]
    requests_per_minute: Annotated[int, Field(gt=0, le=1_000_000)] | None = None
    tokens_per_minute: Annotated[int, Field(gt=0, lt=2**31)] | None = None
    expires_at: Annotated[int, Field(lt=2**33)] | None = None  # Unix seconds

    @field_validator("expires_at")
    @classmethod
    def _is_to_come(cls, value: int | None) -> int | None:
        if value is not None and value <= time.time():
            raise ValueError(f"{value} is in the past; send a time in the future, in Unix seconds.")
        return value


class UpdateProject(BaseModel):
    """The JSON body of POST /v1/x/projects/{id}, which changes a project. Fields that the body leaves out stay as they
    are."""

    model_config = ConfigDict(extra="forbid")
    name: Name = ""
    weight: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    max_running_jobs: Limit | None = None
    max_queued_jobs: Limit | None = None
    max_bytes: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    max_accelerator_hours: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


class CreateProject(UpdateProject):
    """The JSON body of POST /v1/x/projects, which creates a project."""

    name: Name
