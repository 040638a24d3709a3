"""Writes jobs with many training steps into the database, and reads and packs them."""

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, TypeVar

import psycopg
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.store import Store
from services.control_plane.jobs.events import packing
from services.control_plane.jobs.events.events import step_event_id, step_message

Found = TypeVar("Found")


def insert_job(database_url: str, job_id: str) -> str:
    """Adds a running job to the database and returns its id."""
    with psycopg.connect(database_url) as connection:
        connection.execute(
            "INSERT INTO jobs (id, project_id, spec, model_source, model_root, priority, desired, observed, version)"
            " VALUES (%s, 'proj_default', '{}', '/m', 'm', 0, 'run', 'running', 1)",
            [job_id],
        )
    return job_id


def end_job(database_url: str, job_id: str) -> None:
    with psycopg.connect(database_url) as connection:
        ended = "UPDATE jobs SET observed = 'cancelled', finished_at = now(), version = version + 1 WHERE id = %s"
        connection.execute(ended, [job_id])


def metrics_of_step(step: int) -> dict[str, float]:
    """Returns metrics as a job on pairs has them, of which those of an evaluation are missing at most steps."""
    told = {"train_loss": 1 / step, "train_reward_margin": math.sin(step), "train_reward_accuracy": step % 8 / 8}
    return told | ({"full_valid_loss": step / 3, "valid_loss": step / 3} if step % 10 == 0 else {})


def insert_steps(
    database_url: str,
    job_id: str,
    steps: Iterable[int],
    metrics: Callable[[int], Mapping[str, float]] = metrics_of_step,
) -> None:
    """Adds the events of these training steps to the job, as an attempt (run of the job) reports them."""
    columns = "public_id, job_id, attempt, created_at, level, type, message, data, step"
    with (
        psycopg.connect(database_url) as connection,
        connection.cursor() as cursor,
        cursor.copy(f"COPY events ({columns}) FROM STDIN") as copy,
    ):
        for step in steps:
            data = {"step": step, "total_steps": 10**6, **metrics(step)}
            moment = datetime.fromtimestamp(1_800_000_000 + step, UTC)
            event = (step_event_id(job_id, step), job_id, 1, moment, "info", "metrics", step_message(data))
            copy.write_row((*event, json.dumps(data), step))


def insert_message(database_url: str, job_id: str, message: str) -> None:
    with psycopg.connect(database_url) as connection:
        event = f"ftevent-{job_id}-{message}", job_id, message
        columns = "public_id, job_id, message, attempt, level, type"
        connection.execute(f"INSERT INTO events ({columns}) VALUES (%s, %s, %s, 0, 'info', 'message')", event)


def read(database_url: str, work: Callable[[AsyncSession], Awaitable[Found]]) -> Found:
    """Runs `work` with a session that reads the database, and returns what it found."""

    async def run() -> Found:
        store = Store(database_url)
        async with store.snapshot() as session:
            found = await work(session)
        await store.close()
        return found

    return _alone(run())


def pack_all(database_url: str) -> None:
    """Packs until nothing is left to pack."""

    async def run() -> None:
        store = Store(database_url)
        while await packing.pack(store, 10):
            pass
        await store.close()

    _alone(run())


def _alone(work: Coroutine[Any, Any, Found]) -> Found:
    """Runs the coroutine in a thread, because Playwright's tests have a running loop in theirs."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(asyncio.run, work).result()


def counted(database_url: str, job_id: str) -> tuple[int, int]:
    """Returns the number of the job's rows with steps, and the number of its blocks."""
    query = (
        "SELECT (SELECT count(*) FROM events WHERE job_id = %(job)s AND step > 0),"
        " (SELECT count(*) FROM step_blocks WHERE job_id = %(job)s)"
    )
    with psycopg.connect(database_url) as connection:
        row = connection.execute(query, {"job": job_id}).fetchone()
    assert row is not None
    return row[0], row[1]
