"""Writes the result file of a job: a CSV of the metrics of its steps, with the columns of OpenAI's result files."""

import csv
from functools import partial
from io import TextIOWrapper
from typing import BinaryIO

import anyio.to_thread
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.jobs.events.events import metric_names, metrics_of

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


async def write_results(session: AsyncSession, job_id: str, file: BinaryIO) -> None:
    """Writes a CSV with a row for each training step of the job: OpenAI's columns first, then all other metrics.

    Missing values are empty in the CSV. Reads a limited number of steps at a time, to save memory. All statements of
    the session must see the database at the same moment.
    """
    others = sorted(await metric_names(session, job_id) - set(COLUMNS.values()))
    columns = {**COLUMNS, **{key: key for key in others}}
    text = TextIOWrapper(file, "utf-8", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    async for steps in metrics_of(session, job_id):
        rows = ([step.get(key, "") for key in columns.values()] for step in steps)
        await anyio.to_thread.run_sync(partial(writer.writerows, rows))
    text.detach()
