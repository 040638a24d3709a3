"""Tests the sentences that users see about the reports of an attempt (one run of a job)."""

import pytest

from services.contract import StepMetrics
from services.control_plane.attempts.attempts import _step_data
from services.control_plane.jobs.events.events import step_message

PAIRS = {"loss": 0.5, "rewards/margins": 0.25, "rewards/accuracies": 1.0}


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (PAIRS, "training loss=0.5000, margin=0.2500, accuracy=1.000"),
        ({"loss": 0.5, "rewards/margins": 0.25}, "training loss=0.5000, margin=0.2500"),  # kto on single answers
        ({"loss": 0.5}, "training loss=0.5000"),
        (
            PAIRS | {"eval/loss": 0.75},
            "training loss=0.5000, margin=0.2500, accuracy=1.000, full validation loss=0.7500",
        ),
    ],
)
def test_a_step_is_told_by_the_metrics_that_its_objective_has(metrics: dict[str, float], words: str) -> None:
    data = _step_data(StepMetrics(step=1, total_steps=3, metrics=metrics))
    assert step_message(data) == f"Step 1/3: {words}"
