"""Tests how evaluations and items are shown, and how items become the rows of a table."""

import csv
import io
from datetime import UTC, datetime, timedelta

import pytest

from services.control_plane.core.tables import Evaluation, EvaluationItem
from services.control_plane.evaluations import responses

NOW = datetime.now(UTC)


def evaluation(**values: object) -> Evaluation:
    row = Evaluation(
        id="evaluation-1",
        created_at=NOW,
        key_id="key",
        spec={"kind": "score", "model": "m", "baseline": None},
        state="running",
        num_items=10,
        num_stages=2,
        num_stages_done=0,
        num_completed=0,
        num_failed=0,
    )
    for name, value in values.items():
        setattr(row, name, value)
    return row


def row_of(prompt: object, *completions: object) -> dict[str, object]:
    return {"line": 4, "prompt": prompt, "completions": list(completions)}


def test_an_evaluation_ends_when_the_rest_takes_as_long_as_the_work_so_far() -> None:
    now = datetime.now(UTC)
    told = responses.evaluation_object(evaluation(num_stages_done=5, started_at=now - timedelta(seconds=100)))
    assert told["progress"] == 0.25
    assert told["estimated_finish"] == pytest.approx(now.timestamp() + 300, abs=60)
    assert told["request"] == {"kind": "score", "model": "m"}


def test_an_evaluation_that_has_not_begun_or_has_ended_has_no_estimate() -> None:
    assert responses.evaluation_object(evaluation())["estimated_finish"] is None
    ended = evaluation(num_stages_done=5, started_at=NOW, state="cancelled")
    assert responses.evaluation_object(ended)["estimated_finish"] is None


def test_an_item_hides_what_one_stage_leaves_to_the_next() -> None:
    found = {"scored": {"groups": []}, "verdicts": ["first", "neither"]}
    row = EvaluationItem(number=3, row=row_of("Why?"), stage=1, found=found)
    told = responses.item_object(row, num_stages=2)
    assert (told["id"], told["line"], told["status"]) == ("3", 4, "waiting")
    assert told["found"] == {"verdicts": ["first", "neither"], "outcome": "tie"}


def test_a_table_has_a_column_for_each_value_and_quotes_what_needs_quotes() -> None:
    items = [
        {"id": "0", "found": {"answer": {"text": 'a "b",\nc'}, "rewards": [1, 2]}, "error": None},
        {"id": "1", "found": {"answer": {"text": "d"}, "score": 0.5}, "error": {"code": "x"}},
    ]
    rows = list(map(responses.columns_of, items))
    columns = list({name: None for row in rows for name in row})
    table = b"".join(responses.as_csv([row], columns, with_header=not i) for i, row in enumerate(rows))
    first, second = csv.DictReader(io.StringIO(table.decode()))
    assert (first["found.answer.text"], first["found.rewards"], first["found.score"]) == ('a "b",\nc', "[1, 2]", "")
    assert (second["found.score"], second["error.code"]) == ("0.5", "x")
