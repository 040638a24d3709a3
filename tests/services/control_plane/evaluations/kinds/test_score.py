"""Tests the summary of scores."""

from typing import Any

import pytest

from services.control_plane.evaluations.kinds.judging import Grader
from services.control_plane.evaluations.kinds.score import Score
from services.control_plane.evaluations.requests import Judge, Spec
from services.control_plane.models.models import STARTED_AT, NamedModel

MODEL = NamedModel("m", "/m", "m", STARTED_AT)


def item(text: str, score: float, *, is_finished: bool = True) -> dict[str, Any]:
    return {"score": score, "answer": {"text": text, "num_tokens": len(text.split()), "is_finished": is_finished}}


def test_scores_are_summarized_beside_what_the_answers_cost() -> None:
    judge = Judge(type="length")
    score = Score(Spec(kind="score", model="m", judge=judge), MODEL, Grader(judge))
    found = score.summarize([item("a b", 1), item("c d e f", 3, is_finished=False)])
    assert found["score"]["value"] == 2
    assert found["score"]["low"] <= 2 <= found["score"]["high"]
    numbers = found["answers"]["model"]
    assert (numbers["mean_tokens"], numbers["mean_characters"], numbers["unfinished"]) == pytest.approx((3, 5, 0.5))
