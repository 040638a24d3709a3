"""Tests that the JSON of feedback is what the OpenAPI document describes."""

from services.control_plane.core.responses import listing
from services.control_plane.feedback.documents import FeedbackDocument, FeedbackPage
from services.control_plane.feedback.responses import feedback_object
from tests.services.control_plane.documented import check
from tests.services.control_plane.feedback.test_responses import VOTE


def test_votes_and_their_counts_are_as_described() -> None:
    check(FeedbackDocument, feedback_object(VOTE))
    counts = [{"kind": "unpaired", "form": "text", "num_votes": 1}]
    check(FeedbackPage, listing([feedback_object(VOTE)], has_more=False) | {"counts": counts})
