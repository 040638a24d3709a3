"""Tests the JSON of a vote."""

from datetime import UTC, datetime

from services.control_plane.core.tables import Feedback
from services.control_plane.feedback.responses import feedback_object

ROW = {"prompt": "a?", "completion": "b", "label": True, "feedback": {"id": "fb-1", "models": ["tiny"]}}
VOTE = Feedback(id="fb-1", created_at=datetime(2026, 1, 2, tzinfo=UTC), vote="thumb", kind="unpaired", form="text")
VOTE.row, VOTE.num_bytes = ROW, 99


def test_a_vote_is_shown_with_the_row_that_a_training_file_gets() -> None:
    assert feedback_object(VOTE) == {
        "id": "fb-1",
        "object": "feedback",
        "created_at": 1_767_312_000,
        "vote": "thumb",
        "kind": "unpaired",
        "form": "text",
        "row": ROW,
    }
