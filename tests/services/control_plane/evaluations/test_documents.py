"""Tests that the JSON of evaluations and their items is what the OpenAPI document describes."""

from datetime import timedelta

import pytest

from services.control_plane.core.tables import EvaluationItem
from services.control_plane.evaluations.documents import EvaluationDocument, EvaluationItemDocument
from services.control_plane.evaluations.responses import evaluation_object, item_object
from tests.services.control_plane.documented import check
from tests.services.control_plane.evaluations.test_responses import NOW, evaluation, row_of

ERROR = {"code": "model_error", "message": "The model stopped.", "param": None}


@pytest.mark.parametrize(
    "state",
    [
        {"state": "queued", "waits_for": "a place"},
        {"started_at": NOW - timedelta(seconds=9), "num_stages_done": 3},
        {"state": "succeeded", "results": {"mean": 0.5}, "started_at": NOW, "finished_at": NOW, "num_stages_done": 20},
        {"state": "failed", "error": ERROR, "finished_at": NOW},
    ],
)
def test_an_evaluation_is_as_described_in_each_of_its_states(state: dict[str, object]) -> None:
    check(EvaluationDocument, evaluation_object(evaluation(**state)))


def test_an_item_is_as_described_whatever_its_prompt_and_its_end() -> None:
    for prompt, stage, error in (
        ("Why?", 0, None),
        ([{"role": "user", "content": "Why?"}], 2, None),
        ("Why?", 1, {"code": None, "message": "The model stopped."}),
    ):
        found = {"verdicts": ["first", "first"]} if stage else {}
        row = EvaluationItem(number=3, row=row_of(prompt, prompt), stage=stage, found=found, error=error)
        check(EvaluationItemDocument, item_object(row, num_stages=2))
