"""Measures whether the jobs that a service ran in the past slow the service down.

    python -m benchmarks.service.history --ended 1000000 --paused 3000

The benchmark measures the time of five kinds of work: the control plane's regular look at all jobs, the admission of a
job, a list of jobs, a project's usage, and an answer to a request of Prometheus for metrics. It measures each kind
twice: while the database holds only the paused jobs, and when it holds the ended jobs as well.

Each job has an attempt (a run on Ray) and an event. One project owns all jobs; this project has limits for queued jobs
and accelerator hours. A stand-in replaces Ray.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.attempts.reconciler import Reconciler
from services.control_plane.core.store import Store, census, migrate, page
from services.control_plane.core.tables import Job, Project
from services.control_plane.ray_api import RayApi
from services.control_plane.settings import BaseModel, Settings
from services.control_plane.tenants import quotas
from services.local.postgres import start_postgres, stop_postgres
from tests.services.control_plane.conftest import FakeRay

PROJECT = "proj_default"
SPEC = '{"num_workers": 1, "model": "tiny", "training_file": "file-1"}'
JOBS = """
    INSERT INTO jobs (id, project_id, created_at, spec, model_source, model_root, priority,
        desired, observed, version, finished_at, error)
    SELECT %(name)s::text || i, 'proj_default', now() - i * interval '1 minute', %(spec)s::jsonb, '/m', 'tiny', 0,
        %(desired)s::text, %(observed)s::text, 3,
        CASE WHEN %(observed)s::text = 'failed' THEN now() - i * interval '1 minute' END,
        CASE WHEN %(observed)s::text = 'failed' THEN '{"code": "c", "message": "m", "param": null}'::jsonb END
    FROM generate_series(1, %(number)s) AS i
"""
ATTEMPTS = """
    INSERT INTO attempts (job_id, number, created_at, state, token, next_seq, num_accelerators, failed, ended_at)
    SELECT id, 1, created_at, 'ended', 't', 9, 1, false, created_at + interval '30 seconds'
    FROM jobs WHERE starts_with(id, %(name)s::text)
"""
EVENTS = """
    INSERT INTO events (public_id, job_id, attempt, seq, created_at, level, type, message)
    SELECT 'ftevent-' || id, id, 1, 1, created_at, 'info', 'message', 'The job has ended.'
    FROM jobs WHERE starts_with(id, %(name)s::text)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ended", type=int, default=1_000_000, help="Number of ended jobs. Default: %(default)s.")
    parser.add_argument("--paused", type=int, default=3_000, help="Number of paused jobs. Default: %(default)s.")
    parser.add_argument(
        "--times", type=int, default=30, help="How often each kind of work is done. Default: %(default)s."
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raydpo-history-") as folder, ExitStack() as stops:
        home = Path(folder).resolve()
        home.chmod(0o755)
        stops.callback(stop_postgres, home / "postgres")
        ray = FakeRay()
        stops.callback(ray.server.server_close)
        stops.callback(ray.server.shutdown)
        settings = Settings(
            home=home,
            DATABASE_URL=start_postgres(home / "postgres"),
            storage_url=(home / "storage").as_uri(),
            api_key="rd-benchmark",
            advertised_url="http://127.0.0.1:9",
            ray_url=f"http://127.0.0.1:{ray.server.server_port}",
            models={"tiny": BaseModel(source="/nowhere/tiny")},
        )
        migrate(settings.database_url)
        asyncio.run(prepare_project(settings))
        fill(settings, "ftjob-paused-", options.paused, desired="pause", observed="paused")
        before = asyncio.run(measure(settings, options.times))
        began = time.monotonic()
        fill(settings, "ftjob-ended-", options.ended, desired="run", observed="failed")
        print(f"{options.ended} ended jobs were written in {time.monotonic() - began:.0f} s\n")
        after = asyncio.run(measure(settings, options.times))
        print(f"{'seconds, median and longest':32} {'paused only':>16} {'and ended':>16}")
        for what, times in before.items():
            print(f"{what:32} {_told(times):>16} {_told(after[what]):>16}")


async def prepare_project(settings: Settings) -> None:
    """Gives the project that owns all jobs limits of queued jobs and accelerator hours that are too high to refuse a
    job."""
    store = Store(settings.database_url)
    async with store.begin() as session:
        await session.execute(update(Project).values(max_queued_jobs=10**8, max_accelerator_hours=10**8))
    await store.close()


def fill(settings: Settings, name: str, number: int, *, desired: str, observed: str) -> None:
    """Writes `number` jobs into the database, with ids that begin with `name`, and an attempt (a run) and an event of
    each job. `desired` is the state that the user wants for the jobs, `observed` the state that they are in."""
    values = {"name": name, "number": number, "desired": desired, "observed": observed, "spec": SPEC}
    with psycopg.connect(settings.database_url, autocommit=True) as rows:
        for statement in (JOBS, ATTEMPTS, EVENTS):
            rows.execute(statement, values)
        rows.execute("VACUUM ANALYZE")


async def measure(settings: Settings, times: int) -> dict[str, list[float]]:
    """Does each kind of work that the benchmark measures, such as the admission of a job, `times` times. Returns, for
    each kind of work, a list of the seconds that it took each time."""
    store = Store(settings.database_url)
    ray_api = RayApi(settings, store.instance)
    reconciler = Reconciler(store, ray_api, settings, holder="benchmark")

    def in_project(work: Callable[[AsyncSession], Awaitable[Any]]) -> Callable[[], Awaitable[None]]:
        async def run() -> None:
            async with store.begin_for(PROJECT) as session:
                await work(session)

        return run

    async def taken(work: Callable[[], Awaitable[None]]) -> float:
        began = time.monotonic()
        await work()
        return time.monotonic() - began

    async def count() -> None:
        async with store.begin() as session:
            await census(session)

    works = {
        "regular look at all jobs": reconciler.tick,
        "admission of a new job": in_project(quotas.admit_job),
        "first page of 20 jobs": in_project(
            lambda session: page(session, select(Job), (Job.created_at, Job.id), after=None, limit=20)
        ),
        "a project's usage": in_project(quotas.usage),
        "one answer to Prometheus": count,
    }
    found = {name: [await taken(work) for _ in range(times)] for name, work in works.items()}
    await reconciler.release()
    await ray_api.close()
    await store.close()
    return found


def _told(times: list[float]) -> str:
    return f"{statistics.median(times):.3f}, {max(times):.3f}"


if __name__ == "__main__":
    main()
