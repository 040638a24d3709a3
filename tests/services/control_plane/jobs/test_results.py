"""Tests the result file of a job: OpenAI's columns first, then all other metrics."""

import csv
import io
from collections.abc import Mapping

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.store import migrate
from services.control_plane.jobs.results import COLUMNS, write_results
from tests.services.control_plane.steps import counted, end_job, insert_job, insert_steps, pack_all, read

METRICS: dict[int, Mapping[str, float]] = {
    1: {"train_loss": 0.69, "grad_norm": 1.5},
    2: {"train_loss": 0.5, "valid_loss": 0.6, "rewards/margins": 0.1},
}


@pytest.fixture(autouse=True, scope="module")
def _migrated(database_url: str) -> None:
    migrate(database_url)


def written(database_url: str, job_id: str) -> str:
    file = io.BytesIO()

    async def write(session: AsyncSession) -> None:
        await write_results(session, job_id, file)

    read(database_url, write)
    return file.getvalue().decode()


def test_a_row_for_each_step_has_openais_columns_first_and_blanks_for_what_was_not_measured(database_url: str) -> None:
    job_id = insert_job(database_url, "ftjob-short")
    insert_steps(database_url, job_id, METRICS, METRICS.__getitem__)
    header, first, second = csv.reader(io.StringIO(written(database_url, job_id)))
    assert header == [*COLUMNS, "grad_norm", "rewards/margins"]
    assert dict(zip(header, first, strict=True)) == {
        **dict.fromkeys(header, ""),
        "step": "1",
        "train_loss": "0.69",
        "grad_norm": "1.5",
    }
    assert (second[header.index("valid_loss")], second[header.index("rewards/margins")]) == ("0.6", "0.1")


def test_a_file_of_steps_in_blocks_is_the_same(database_url: str) -> None:
    job_id = insert_job(database_url, "ftjob-long")
    insert_steps(database_url, job_id, range(1, 3500))
    as_rows = written(database_url, job_id)
    assert as_rows.count("\n") == 3500
    pack_all(database_url)
    assert counted(database_url, job_id) == (1499, 2)
    assert written(database_url, job_id) == as_rows
    end_job(database_url, job_id)
    pack_all(database_url)
    assert counted(database_url, job_id) == (0, 4)
    assert written(database_url, job_id) == as_rows


def test_a_job_without_steps_has_the_columns_alone(database_url: str) -> None:
    assert written(database_url, insert_job(database_url, "ftjob-none")) == ",".join(COLUMNS) + "\n"
