"""Tests what a client is told of rounds at each stage."""

from datetime import UTC, datetime
from typing import Any

from services.control_plane.core.tables import Rounds
from services.control_plane.rounds.responses import rounds_object

NOW = datetime.now(UTC)
RESULTS = {"score": {"value": 0.5, "low": 0.4, "high": 0.6}, "win_rate": None, "kl": None}
FIRST = {"number": 0, "model": "m", "evaluations": {"quality": "evaluation-1"}, "results": RESULTS}


def rounds(*history: dict[str, Any], **values: Any) -> Rounds:
    row = Rounds(id="rounds-1", created_at=NOW, key_id="key", spec={"model": "m", "file": None}, state="running")
    row.history = list(history)
    for name, value in values.items():
        setattr(row, name, value)
    return row


def test_the_newest_round_has_what_it_has_made_so_far() -> None:
    told = rounds_object(rounds(FIRST, {"number": 1, "samples": "evaluation-2"}))
    assert (told["stage"], told["model"], told["request"]) == ("file", "m", {"model": "m"})
    first, newest = told["rounds"]
    assert (first["score"], first["evaluations"]) == (RESULTS["score"], {"quality": "evaluation-1"})
    assert (newest["samples"], newest["job"], newest["evaluations"]) == ("evaluation-2", None, {})


def test_rounds_that_have_ended_are_at_no_stage() -> None:
    assert rounds_object(rounds(FIRST, {"number": 1}, state="cancelled"))["stage"] is None
