"""Tests which spans of a trace the reports of an attempt (one run of a job) become."""

from typing import Any

import pytest

from services import tracing
from services.contract import Message, Progress, StepMetrics
from services.training.reports.stages import SECONDS, STEPS, StageSpans

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

Span = tuple[str, float, float, int, int]


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> list[Span]:
    """Returns the list of all spans that are written: name, start, end, and the first and last number."""
    written: list[Span] = []
    keys: set[str] = set()

    def record(name: str, *, parent: str, key: str, start: float, end: float, attributes: dict[str, Any]) -> None:
        assert parent == PARENT
        assert key not in keys, "two spans would have the same id"
        keys.add(key)
        written.append((name, start, end, attributes["raydpo.first"], attributes["raydpo.last"]))

    monkeypatch.setattr(tracing, "record", record)
    return written


def step(number: int) -> StepMetrics:
    return StepMetrics(step=number, total_steps=1000, metrics={})


def test_each_stage_is_a_span_from_its_first_report_to_its_last(spans: list[Span]) -> None:
    stages = StageSpans(PARENT)
    for at, report in (
        (1.0, Progress(stage="downloading", done=0, total=9)),
        (3.0, Progress(stage="downloading", done=9, total=9)),
        (4.0, Message(message="no stage")),
        (5.0, Progress(stage="encoding", done=0, total=20)),
        (8.0, Progress(stage="encoding", done=20, total=20)),
        (9.0, step(1)),
        (10.0, step(2)),
    ):
        stages.add(report, at)
    stages.end()
    stages.end()  # the last stage is written once
    assert spans == [
        ("downloading", 1.0, 3.0, 0, 9),
        ("encoding", 3.0, 8.0, 0, 20),  # stages follow each other without a gap
        ("training", 8.0, 10.0, 1, 2),
    ]


def test_training_is_divided_after_some_steps_or_seconds(spans: list[Span]) -> None:
    stages = StageSpans(PARENT)
    for number in range(1, STEPS + 2):
        stages.add(step(number), number / 1000)
    stages.add(step(STEPS + 2), SECONDS + 1)
    stages.end()
    assert [(first, last) for _, _, _, first, last in spans] == [(1, STEPS), (STEPS + 1, STEPS + 2)]
