"""Measures the service's web page in Debian's Chromium: the size of its files, the time of its first view, and the time
and frame rate with which it draws long jobs and long lists.

    python -m benchmarks.service.page

Starts `raydpo up` without a Ray cluster, and writes the jobs and their metrics directly into its database. While the
browser's frames are counted, a job of 3,600 steps gets 20 more steps a second.
"""

import argparse
import asyncio
import gzip
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psycopg
from playwright.sync_api import Browser, Page, sync_playwright

from services.control_plane.core.store import Store
from services.control_plane.jobs.events import packing
from services.control_plane.page.api import BUILT

FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
PAIR = {"prompt": "Where is the red saw?", "chosen": "Aisle four, on the left.", "rejected": "No idea."}
SHARED = ["loss", "reward_margin", "reward_accuracy", "mean_token_accuracy"]  # by training and validation
CURVES = [f"{kind}_{name}" for kind in ("train", "full_valid") for name in SHARED]
CURVES += ["logps_chosen", "logps_rejected", "eval/logps/chosen", "eval/logps/rejected", "rewards_chosen"]
CURVES += ["rewards_rejected", "kl", "eval/kl", "tokens_per_second", "grad_norm", "learning_rate"]
COPY = """
    INSERT INTO jobs SELECT copy.* FROM jobs, generate_series(1, %(number)s) AS i,
    jsonb_populate_record(jobs, jsonb_build_object(
        'id', %(name)s::text || i, 'created_at', now() - i * interval '1 minute',
        'observed', %(observed)s::text, 'finished_at', CASE WHEN %(observed)s::text = 'running' THEN NULL ELSE now() END
    )) AS copy WHERE jobs.id = %(job_id)s
"""
STEPS = """
    INSERT INTO events (public_id, job_id, attempt, seq, level, type, message, step, data)
    SELECT 'ftevent-' || %(job_id)s::text || i, %(job_id)s::text, 1, i, 'info', 'metrics', 'Step', i,
        jsonb_build_object('step', i, 'total_steps', %(last)s::int) || (
            SELECT jsonb_object_agg(name, 1 + sin(i / 50.0 + number) / 4 + random() / 10 + 20.0 / (20 + i))
            FROM unnest(%(curves)s::text[]) WITH ORDINALITY AS curve (name, number)
        )
    FROM generate_series(%(first)s::int, %(last)s::int) AS i
"""
COUNT_FRAMES = """(seconds) => new Promise((done) => {
    const times = [];
    const take = (now) => {
        times.push(now);
        if (now - times[0] < seconds * 1000) return requestAnimationFrame(take);
        const gaps = times.slice(1).map((time, i) => time - times[i]).sort((a, b) => a - b);
        const late = gaps[Math.floor(gaps.length * 0.99)];
        done({ frames: gaps.length / (now - times[0]) * 1000, late, worst: gaps.at(-1) });
    };
    requestAnimationFrame(take);
})"""
FRAME_MS = 1000 / 60
PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="Seconds to count frames for. Default: %(default)s.")
    parser.add_argument(
        "--steps", type=int, default=1_000_000, help="Number of steps of the long job. Default: %(default)s."
    )
    parser.add_argument("--jobs", type=int, default=10_000, help="Number of jobs in the list. Default: %(default)s.")
    parser.add_argument("--times", type=int, default=5, help="How often each view is loaded. Default: %(default)s.")
    options = parser.parse_args()
    told(
        "scripts and styles, gzip",
        f"{sum(map(packed, BUILT.rglob('*.js'))):,}, {sum(map(packed, BUILT.rglob('*.css'))):,} bytes",
    )
    with running_service() as (url, key, database), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        job_id = submit(url, key)
        copy = {"job_id": job_id, "curves": CURVES}
        database.execute(COPY, copy | {"number": 1, "name": "ftjob-live-", "observed": "running"})
        database.execute(STEPS, copy | {"job_id": "ftjob-live-1", "first": 1, "last": 3600})
        measure_first_view(browser, url, options.times)
        measure_frames(browser, url, key, database, options.seconds)
        database.execute(COPY, copy | {"number": options.jobs, "name": "ftjob-old-", "observed": "cancelled"})
        last_row = f"tbody tr:nth-child({min(25, options.jobs + 2)})"  # two jobs were there before
        loads(browser, url, key, options.times, f"list of {options.jobs:,} jobs", "#/jobs", last_row)
        began = time.monotonic()
        database.execute(COPY, copy | {"number": 1, "name": "ftjob-long-", "observed": "running"})
        database.execute(STEPS, copy | {"job_id": "ftjob-long-1", "first": 1, "last": options.steps})
        database.execute("VACUUM ANALYZE")
        packing_thread = threading.Thread(target=asyncio.run, args=(pack_steps(database),))  # this one has a loop
        packing_thread.start()
        packing_thread.join()
        told(f"writing {options.steps:,} steps", f"{time.monotonic() - began:.0f} s, with packing all but the newest")
        where = "figure canvas"
        loads(browser, url, key, options.times, f"job of {options.steps:,} steps", "#/jobs/ftjob-long-1", where)
        part = f"#/jobs/ftjob-long-1?from={options.steps // 2}&to={options.steps // 2 + 10_000}"
        loads(browser, url, key, options.times, "10,000 steps of it", part, where)
        browser.close()


def told(what: str, figure: str) -> None:
    print(f"{what:32} {figure}", flush=True)


def packed(file: Path) -> int:
    return len(gzip.compress(file.read_bytes()))


@contextmanager
def running_service() -> Iterator[tuple[str, str, psycopg.Connection[Any]]]:
    """Runs `raydpo up` without a Ray cluster during the `with` block. Yields the service's URL, its API key and a
    connection to its database."""
    with tempfile.TemporaryDirectory(prefix="raydpo-page-", ignore_cleanup_errors=True) as folder:
        home = Path(folder).resolve()
        home.chmod(0o755)
        (home / "model").mkdir()
        (home / "model" / "config.json").write_text("{}")
        up = f"up --home {home} --port 0 --ray-address http://127.0.0.1:9 --model tiny={home / 'model'}"
        program = "from services.cli.app import app; app()"
        server = subprocess.Popen([sys.executable, "-c", program, *up.split()], stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            while "base models" not in (line := server.stdout.readline()):
                assert line, "the service did not start"
            _, _, _, port, place, *_ = (home / "postgres" / "postmaster.pid").read_text().splitlines()
            url = (home / "url").read_text().removesuffix("/v1")
            with psycopg.connect(
                host=place, port=port, user="postgres", dbname="postgres", autocommit=True
            ) as database:
                yield url, (home / "api.key").read_text(), database
        finally:
            server.terminate()
            server.wait()


async def pack_steps(database: psycopg.Connection[Any]) -> None:
    """Packs the metrics of the steps of all jobs into compressed blocks, as the service itself does in the
    background."""
    place = database.info
    store = Store(f"postgresql://postgres@/postgres?host={place.host}&port={place.port}")
    while await packing.pack(store, 100):
        pass
    await store.close()


def submit(url: str, key: str) -> str:
    """Submits a job, and returns its id. The job stays in the queue, because there is no Ray cluster."""
    with httpx.Client(base_url=f"{url}/v1", headers={"Authorization": f"Bearer {key}"}, timeout=60) as api:
        rows = (json.dumps(PAIR) + "\n").encode() * 20
        file = api.post("/files", files={"file": ("pairs.jsonl", rows)}, data={"purpose": "fine-tune"}).json()
        body = {"model": "tiny", "training_file": file["id"], "method": {"type": "dpo"}}
        return str(api.post("/fine_tuning/jobs", json=body).json()["id"])


@contextmanager
def tab(browser: Browser, key: str | None) -> Iterator[Page]:
    """Opens a browser tab with an empty cache for the `with` block. If `key` is given, the tab is signed in to the
    service with this API key."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    if key:
        kept = json.dumps(json.dumps({"token": key}))
        context.add_init_script(f"sessionStorage.setItem('raydpo session', {kept})")
    yield context.new_page()
    context.close()


def loads(browser: Browser, url: str, key: str, times: int, what: str, place: str, until: str) -> None:
    """Opens the page `place` `times` times, and prints the median and the longest time until the page shows the element
    with the CSS selector `until`. `what` names the measurement in the output."""

    def load() -> float:
        with tab(browser, key) as page:
            began = time.monotonic()
            page.goto(f"{url}/{place}")
            page.wait_for_selector(until, timeout=600_000)
            return time.monotonic() - began

    told(what, _seconds(load, times))


def measure_first_view(browser: Browser, url: str, times: int) -> None:
    def load() -> float:
        with tab(browser, None) as page:
            page.goto(f"{url}/")
            page.wait_for_selector("#key")
            page.wait_for_function(PAINT)
            return float(page.evaluate(PAINT)) / 1000

    told("first view, empty cache", _seconds(load, times))


def _seconds(load: Callable[[], float], times: int) -> str:
    taken = [load() for _ in range(times)]
    return f"{median(taken):.2f} s, at most {max(taken):.2f}"


def measure_frames(browser: Browser, url: str, key: str, database: psycopg.Connection[Any], seconds: float) -> None:
    """Counts the browser's frames for `seconds` while the page of a job shows nothing new, and then for `seconds` while
    the job gets 20 steps a second. Prints both."""
    with tab(browser, key) as page:
        page.goto(f"{url}/#/jobs/ftjob-live-1")
        page.wait_for_selector("figure canvas")
        told("frames at rest", _frames(page, seconds))
        ends = threading.Event()

        def stream() -> None:
            step = 3600
            while not ends.wait(0.05):
                step += 1
                values = {"job_id": "ftjob-live-1", "curves": CURVES, "first": step, "last": step}
                database.execute(STEPS, values)

        streaming = threading.Thread(target=stream)
        streaming.start()
        page.wait_for_timeout(1000)
        before = steps_drawn(page)
        told(f"frames, {len(CURVES)} curves stream", _frames(page, seconds))
        told("steps drawn meanwhile", f"{steps_drawn(page) - before:.0f}")
        told("tasks meanwhile", _tasks(browser, page, seconds))
        ends.set()
        streaming.join()


def steps_drawn(page: Page) -> int:
    """Returns the newest step that the first chart shows."""
    label = page.locator("figure.curve").first.get_attribute("aria-label") or ""
    return int(label.rsplit(" ", 1)[-1].replace(",", "").replace("\u202f", ""))


def _frames(page: Page, seconds: float) -> str:
    """Counts the browser's frames for `seconds`. Returns a text with the frame rate, the times between frames, and the
    share of a core that the page's process used."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")

    def cpu_seconds() -> float:
        told = session.send("Performance.getMetrics")["metrics"]
        return float(next(each["value"] for each in told if each["name"] == "ProcessTime"))

    before = cpu_seconds()
    counted = page.evaluate(COUNT_FRAMES, seconds)
    share = (cpu_seconds() - before) / seconds
    frames = (
        f"{counted['frames']:.1f} a second, 99 % within {counted['late']:.0f} ms, at most {counted['worst']:.0f} ms"
    )
    return f"{frames}; {100 * share:.0f} % of a core"


def _tasks(browser: Browser, page: Page, seconds: float) -> str:
    """Measures the processor time of each task of the page's thread, in which its scripts run and frames are made. It
    does not grow with the load of the machine, as the times between frames do.
    """
    browser.start_tracing(page=page, categories=["toplevel", "__metadata"])
    page.wait_for_timeout(1000 * seconds)
    events = json.loads(browser.stop_tracing())["traceEvents"]
    main = next(each for each in events if each["name"] == "thread_name" and "RendererMain" in each["args"]["name"])
    tasks = [
        each.get("tdur", 0) / 1000
        for each in events
        if each["name"].endswith("RunTask") and (each["pid"], each["tid"]) == (main["pid"], main["tid"])
    ]
    late = sum(task > FRAME_MS for task in tasks)
    return f"at most {max(tasks):.1f} ms of a processor; {late} of {len(tasks):,} are longer than a frame"


if __name__ == "__main__":
    main()
