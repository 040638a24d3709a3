"""Tests the result file of a job: OpenAI's columns first, then all other metrics."""

import csv
import io

from services.control_plane.jobs.results import COLUMNS, results_csv


def test_a_row_for_each_step_has_openais_columns_first_and_blanks_for_what_was_not_measured() -> None:
    metrics = [
        {"step": 1, "total_steps": 2, "train_loss": 0.69, "grad_norm": 1.5},
        {"step": 2, "total_steps": 2, "train_loss": 0.5, "valid_loss": 0.6, "rewards/margins": 0.1},
    ]
    header, first, second = csv.reader(io.StringIO(results_csv(metrics).decode()))
    assert header == [*COLUMNS, "grad_norm", "rewards/margins"]
    assert dict(zip(header, first, strict=True)) == {
        **dict.fromkeys(header, ""),
        "step": "1",
        "train_loss": "0.69",
        "grad_norm": "1.5",
    }
    assert (second[header.index("valid_loss")], second[header.index("rewards/margins")]) == ("0.6", "0.1")


def test_a_job_without_steps_has_the_columns_alone() -> None:
    assert results_csv([]).decode() == ",".join(COLUMNS) + "\n"
