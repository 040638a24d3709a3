"""Builds the JSON objects of evaluations and of their items (prompts with results), and writes items as JSON Lines and
CSV.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from services.control_plane.core.responses import seconds
from services.control_plane.core.tables import EVALUATION_ENDS, Evaluation, EvaluationItem
from services.control_plane.evaluations.kinds.judging import agreed

INTERNAL = {"scored"}  # what one stage leaves to the next: token ids and log-probabilities
OUTCOMES = {"first": "win", "second": "loss", "neither": "tie"}


def evaluation_object(row: Evaluation) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "evaluation",
        "created_at": seconds(row.created_at),
        "kind": row.spec["kind"],
        "status": row.state,
        "model": row.spec["model"],
        "request": {name: value for name, value in row.spec.items() if value is not None},
        "num_items": row.num_items,
        "num_completed": row.num_completed,
        "num_failed": row.num_failed,
        "progress": _progress(row),
        "started_at": seconds(row.started_at),
        "estimated_finish": _estimated_finish(row),
        "finished_at": seconds(row.finished_at),
        "waits_for": row.waits_for,
        "results": row.results,
        "error": row.error,
    }


def _progress(row: Evaluation) -> float:
    return row.num_stages_done / (row.num_items * row.num_stages)


def _estimated_finish(row: Evaluation) -> int | None:
    if row.started_at is None or not row.num_stages_done or row.state in EVALUATION_ENDS:
        return None
    now = datetime.now(UTC)
    done = _progress(row)
    return seconds(now + (now - row.started_at) * ((1 - done) / done))


def item_object(row: EvaluationItem, num_stages: int) -> dict[str, Any]:
    found = {name: value for name, value in row.found.items() if name not in INTERNAL}
    if "verdicts" in found:
        found["outcome"] = OUTCOMES[agreed(found["verdicts"])]
    return {
        "id": str(row.number),
        "object": "evaluation.item",
        "line": row.row["line"],
        "status": "failed" if row.error else "completed" if row.stage == num_stages else "waiting",
        "prompt": row.row["prompt"],
        "completions": row.row["completions"],
        "found": found,
        "error": row.error,
    }


def as_jsonl(items: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items).encode()


def columns_of(item: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of an evaluation's item (a prompt with results) as the columns of a table, by their paths in
    the item, such as `found.answer.text`. Lists become JSON texts.
    """
    return dict(_flat(item, ""))


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}".lstrip("."))
    else:
        yield name, json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value


def as_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, with_header: bool) -> bytes:
    """Returns `rows` as bytes of a CSV file, with the columns `columns`. A value that a row lacks is empty.

    If `with_header` is true, a line with the names of the columns comes first.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore")
    if with_header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
