"""The JSON objects of feedback (votes on completions), as the OpenAPI document describes them.

docs/wire/objects.md says what the fields mean.
"""

from typing import Any, Literal

from typing_extensions import TypedDict

from services.control_plane.feedback.requests import Form, Kind


class FeedbackDocument(TypedDict):
    id: str
    object: Literal["feedback"]
    created_at: int
    vote: Literal["choice", "thumb", "ratings", "edit"]
    kind: Kind
    form: Form
    row: dict[str, Any]


class CountDocument(TypedDict):
    kind: Kind
    form: Form
    num_votes: int


class FeedbackPage(TypedDict):
    object: str
    data: list[FeedbackDocument]
    has_more: bool
    first_id: str | None
    last_id: str | None
    counts: list[CountDocument]
