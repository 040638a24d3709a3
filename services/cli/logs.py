"""A job's logs, as far as they are there or as they are written."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from services.cli.client import fail
from services.cli.watch import POLL_SECONDS, TERMINAL

if TYPE_CHECKING:
    from openai import OpenAI

LAST_SECONDS = 5.0  # after its end, in which a job's last lines arrive


def read_logs(client: "OpenAI", job_id: str, *, attempt: int | None, source: str, follow: bool) -> Iterator[str]:
    """Lines of one attempt; `follow`: until the job ends, and on to the next attempt unless one is named."""
    at, shown, ended_at = 0, attempt, None
    while True:
        page = _page(client, job_id, shown, source, at)
        yield from page["data"]
        shown, at = page["attempt"], page["next"]
        if page["has_more"]:
            continue
        if attempt is None and (later := [number for number in page["attempts"] if number > shown]):
            shown, at = later[0], 0
            continue
        if not follow and source not in page["sources"]:
            known = ", ".join(page["sources"]) or "nothing"
            fail(f"attempt {shown} has logs of {known}.")
        if not follow or (ended_at is not None and time.monotonic() - ended_at > LAST_SECONDS):
            return
        if ended_at is None and client.fine_tuning.jobs.retrieve(job_id).status in TERMINAL:
            ended_at = time.monotonic()
        time.sleep(POLL_SECONDS)


def _page(client: "OpenAI", job_id: str, attempt: int | None, source: str, after: int) -> dict[str, Any]:
    params = {"source": source, "after": after} | ({"attempt": attempt} if attempt else {})
    return client.get(f"/x/jobs/{job_id}/logs", cast_to=dict[str, Any], options={"params": params})
