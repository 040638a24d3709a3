"""Tests that the JSON of rounds is what the OpenAPI document describes."""

from typing import Any

import pytest

from services.control_plane.rounds.documents import RoundsDocument
from services.control_plane.rounds.responses import rounds_object
from tests.services.control_plane.documented import check
from tests.services.control_plane.rounds.test_responses import FIRST, NOW, RESULTS, rounds

SECOND = {
    "number": 1,
    "samples": "evaluation-2",
    "rows": {"num_rows": 12},
    "file": "file-1",
    "job": "ftjob-1",
    "model": "n",
    "evaluations": {"quality": "evaluation-3", "drift": "evaluation-4"},
    "results": {**RESULTS, "kl": RESULTS["score"]},
}


@pytest.mark.parametrize(
    "state",
    [
        {"waits_for": "a place"},
        {"state": "paused"},
        {"state": "succeeded", "end_reason": "num_rounds", "finished_at": NOW},
        {"state": "failed", "error": {"code": None, "message": "No.", "param": None}, "finished_at": NOW},
    ],
)
def test_rounds_are_as_described_in_each_of_their_states(state: dict[str, Any]) -> None:
    check(RoundsDocument, rounds_object(rounds({"number": 0, "model": "m"}, **state)))
    check(RoundsDocument, rounds_object(rounds(FIRST, SECOND, {"number": 2}, **state)))
