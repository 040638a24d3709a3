"""Reads the log of one of a job's processes from the service."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from services.cli.client import fail

if TYPE_CHECKING:
    from openai import OpenAI

TERMINAL = ("succeeded", "failed", "cancelled")
POLL_SECONDS = 2.0
LAST_SECONDS = 5.0  # how long to wait for the last lines after a job has ended


def read_logs(client: "OpenAI", job_id: str, *, attempt: int | None, source: str, follow: bool) -> Iterator[str]:
    """Yields the log lines of one of a job's processes in one attempt (one run of the job on Ray).

    `source` names the process, such as `driver`. `attempt` is the attempt's number; None means the newest attempt. With
    `follow`, new lines are yielded until the job ends; if `attempt` is None, these include the lines of later attempts.
    """
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
            known = ", ".join(page["sources"]) or "none"
            fail(f"attempt {shown} has no logs of {source}; sources that have logs: {known}.")
        if not follow or (ended_at is not None and time.monotonic() - ended_at > LAST_SECONDS):
            return
        if ended_at is None and client.fine_tuning.jobs.retrieve(job_id).status in TERMINAL:
            ended_at = time.monotonic()
        time.sleep(POLL_SECONDS)


def _page(client: "OpenAI", job_id: str, attempt: int | None, source: str, after: int) -> dict[str, Any]:
    params = {"source": source, "after": after} | ({"attempt": attempt} if attempt else {})
    return client.get(f"/x/jobs/{job_id}/logs", cast_to=dict[str, Any], options={"params": params})
