"""Tests the summary of scores, and grades from a stand-in for the served models."""

from typing import Any

import httpx
import pytest

from services.control_plane.evaluations.kinds.judging import Grader
from services.control_plane.evaluations.kinds.score import Score
from services.control_plane.evaluations.requests import Judge, Spec
from services.control_plane.models.models import STARTED_AT, NamedModel
from tests.services.control_plane.evaluations.conftest import POLICY, Engines, chats, created, ended, results

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


@pytest.mark.usefixtures("policy")
def test_a_model_that_is_asked_grades_each_answer_from_1_to_10(api: httpx.Client, engines: Engines) -> None:
    judge = {"type": "model", "model": "fair", "criteria": "Value {brevity}."}
    found = results(api, kind="score", model=POLICY, judge=judge, rows=chats(3))
    assert found["score"] == {"value": 9, "low": 9, "high": 9}
    asked = [body for model, body in engines.asked if model == "fair"]
    assert len(asked) == 3
    assert {body["temperature"] for body in asked} == {0}
    assert asked[0]["structured_outputs"] == {"choice": ["1", "2", "3", "4", "5", "6", "7", "8", "9", "10"]}
    question = asked[0]["messages"][0]["content"]
    assert all(part in question for part in ("Value {brevity}.", "user: Question", "<answer>\ngood answer"))
    engines.endings["tiny"] = " indeed" * 5  # beside five other words
    assert results(api, kind="score", model="tiny", judge=judge, rows=chats(3))["score"]["value"] == 10


@pytest.mark.usefixtures("policy")
def test_an_item_whose_grade_cannot_be_used_fails(api: httpx.Client, engines: Engines) -> None:
    engines.endings["tiny"] = " indeed" * 6
    body = {"kind": "score", "model": "tiny", "judge": {"type": "model", "model": "fair"}, "rows": chats(1)}
    found = ended(api, created(api, **body)["id"])
    assert (found["status"], found["num_failed"]) == ("failed", 1)
    assert "The judge 'fair' answered '11', but it had to answer '1' or '2'" in found["error"]["message"]
