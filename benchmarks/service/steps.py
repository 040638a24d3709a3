"""Measures how much room the metrics of a job's training steps take in the database, and how fast they are read.

    python -m benchmarks.service.steps --steps 100000 1000000

For each number of steps, writes a job with the metrics of DPO. Most metrics are float32, as dpo_core reports them.
Measures each job twice: first with a database row for each step, then with the steps packed into compressed blocks. The
figures are:

- the size in the database, with indexes
- the time of the first answer for a chart of all steps, and for a chart of a hundredth of the steps
- the time and memory of writing the job's result file
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import psycopg

from services.control_plane.core.store import Store, migrate
from services.control_plane.jobs.events import packing
from services.control_plane.jobs.results import write_results
from services.control_plane.progress.metrics import Range, series
from services.local.postgres import start_postgres, stop_postgres

SINGLE = ["train_loss", "rewards_chosen", "rewards_rejected", "train_reward_margin", "train_reward_accuracy", "kl"]
SINGLE += ["logps_chosen", "logps_rejected", "logratios/chosen", "logratios/rejected", "lengths/chosen"]
SINGLE += ["lengths/rejected", "grad_norm"]
JOB = """
    INSERT INTO jobs (id, project_id, spec, model_source, model_root, priority, desired, observed, version, finished_at,
        error)
    VALUES (%s, 'proj_default', '{}', '/m', 'm', 0, 'run', 'failed', 1, now(), '{}')
"""
STEPS = """
    INSERT INTO events (public_id, job_id, attempt, seq, level, type, message, step, data)
    SELECT 'ftevent-' || left(encode(sha256((%(job_id)s::text || i)::bytea), 'hex'), 24), %(job_id)s::text, 1, i,
        'info', 'metrics', 'Step ' || i || '/1000000: training loss=0.6931, margin=0.0012, accuracy=0.500', i,
        (SELECT jsonb_object_agg(name, (sin(i / 500.0 + number) + random() / 5)::real::float8)
            FROM unnest(%(single)s::text[]) WITH ORDINALITY AS metric (name, number))
        || jsonb_build_object('step', i, 'total_steps', 1000000, 'learning_rate', 5e-5 * (1 - i / 1e6),
            'tokens_per_second', 50000 + 1000 * random(), 'hfu', 0.4 + random() / 100,
            'tokens/computed', 20000 + i %% 977, 'tokens/shared', 2000 + i %% 313)
    FROM generate_series(%(first)s::int, %(last)s::int) AS i
"""
SIZE = "SELECT pg_total_relation_size('events') + pg_total_relation_size('step_blocks')"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[100_000, 1_000_000], help="Numbers of steps to measure."
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raydpo-steps-") as folder, ExitStack() as stops:
        home = Path(folder).resolve()
        home.chmod(0o755)
        stops.callback(stop_postgres, home / "postgres")
        url = start_postgres(home / "postgres")
        migrate(url)
        for steps in options.steps:
            job_id = f"ftjob-{steps}"
            fill(url, job_id, steps)
            asyncio.run(measure(url, job_id, steps, "rows"))
            asyncio.run(pack(url, steps))
            asyncio.run(measure(url, job_id, steps, "blocks"))


def fill(url: str, job_id: str, steps: int) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("TRUNCATE events, step_blocks")
        connection.execute(JOB, [job_id])
        for first in range(1, steps, 10_000):
            values = {"job_id": job_id, "single": SINGLE, "first": first, "last": first + 9_999}
            connection.execute(STEPS, values)
        connection.execute("VACUUM ANALYZE")


async def pack(url: str, steps: int) -> None:
    async with opened(url) as store:
        began = time.monotonic()
        while await packing.pack(store, 100):
            pass
        print(f"{steps:>10,} packed at {steps / (time.monotonic() - began):,.0f} steps a second", flush=True)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("VACUUM FULL events")


async def measure(url: str, job_id: str, steps: int, kind: str) -> None:
    with psycopg.connect(url) as connection:
        row = connection.execute(SIZE).fetchone()
        assert row is not None
    told = [f"{row[0] / steps:.0f} bytes a step"]
    async with opened(url) as store:
        middle = Range.model_validate({"from": steps // 2, "to": steps // 2 + steps // 100})
        for what, asked in (("all steps", Range()), ("a hundredth", middle)):
            began = time.monotonic()
            async with store.snapshot() as session:
                found = await series(session, job_id, asked)
            told.append(f"{what} {time.monotonic() - began:.2f} s, {len(found['steps'])} points")
        began = time.monotonic()
        with tempfile.TemporaryFile() as file:
            async with store.snapshot() as session:
                await write_results(session, job_id, file)
            size = file.seek(0, 2)
        told.append(f"result file of {size / 1e6:.0f} MB {time.monotonic() - began:.1f} s")
        told.append(f"at most {peak_bytes() / 2**20:.0f} MiB in memory so far")
    print(f"{steps:>10,} {kind:6} {'; '.join(told)}", flush=True)


def peak_bytes() -> int:
    """Returns this process's peak resident memory so far, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Store]:
    store = Store(url)
    yield store
    await store.close()


if __name__ == "__main__":
    main()
