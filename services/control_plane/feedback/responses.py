"""Builds the JSON object of the API for a vote."""

from typing import Any

from services.control_plane.core.responses import seconds
from services.control_plane.core.tables import Feedback


def feedback_object(row: Feedback) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "feedback",
        "created_at": seconds(row.created_at),
        "vote": row.vote,
        "kind": row.kind,
        "form": row.form,
        "row": row.row,
    }
