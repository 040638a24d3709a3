"""Writes the result file of a job: a CSV of the metrics of its steps, with the columns of OpenAI's result files."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = {  # column of the CSV: key in the metrics of a step
    "step": "step",
    "train_loss": "train_loss",
    "train_accuracy": "train_mean_token_accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_mean_token_accuracy",
    "train_reward_accuracy": "train_reward_accuracy",
    "train_reward_margin": "train_reward_margin",
    "valid_reward_accuracy": "valid_reward_accuracy",
    "valid_reward_margin": "valid_reward_margin",
}


def results_csv(metrics: Sequence[Mapping[str, Any]]) -> bytes:
    """Returns a CSV with a row for each training step: OpenAI's columns first, then all other metrics.

    `metrics` holds a dictionary for each step. Missing values are empty in the CSV.
    """
    others = sorted({key for row in metrics for key in row} - set(COLUMNS.values()) - {"total_steps"})
    columns = {**COLUMNS, **{key: key for key in others}}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([row.get(key, "") for key in columns.values()] for row in metrics)
    return text.getvalue().encode()
