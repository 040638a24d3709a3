"""Shows a job's progress while the job runs: a progress bar on a terminal, plain lines in a pipe."""

import json
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.text import Text

from services.cli.client import safe

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.fine_tuning import FineTuningJob

SILENCE_SECONDS = 60.0  # of silence before reconnecting; the service sends data at least every 15 seconds
RESUME_SECONDS = 2.0
PLAIN_SECONDS = 10.0  # the least time between two lines of metrics if the output is not a terminal
STYLES = {"warn": "yellow", "error": "red"}
SHOWN = {
    "train_loss": "loss {:.4f}",
    "train_reward_margin": "margin {:.3f}",
    "train_reward_accuracy": "accuracy {:.0%}",
}


def watch_job(client: "OpenAI", job_id: str, *, console: Console) -> "FineTuningJob":
    """Prints the job's messages and metrics on `console` until the job ends, and returns the ended job."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[detail]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("waiting", total=None, detail="")
        metrics: Mapping[str, Any] = {}
        printed_at = 0.0
        for told in follow(client, job_id):
            match told["object"]:
                case "fine_tuning.job":
                    break
                case "fine_tuning.job.progress":
                    _advance(bar, task, told, metrics)
                case _ if told["type"] == "metrics":
                    metrics = told["data"]
                    due = not console.is_terminal and time.monotonic() - printed_at > PLAIN_SECONDS
                    if due or metrics["step"] == metrics["total_steps"]:
                        printed_at = time.monotonic()
                        steps = f"{metrics['step']}/{metrics['total_steps']}"
                        console.print(f"step {steps}  {metrics_line(metrics)}")
                case _:
                    console.print(message_line(told))
    return client.fine_tuning.jobs.retrieve(job_id)


def message_line(told: Mapping[str, Any]) -> Text:
    """Returns the time and message of the job's event `told`, as a line to print on a terminal.

    Text that the message quotes from a file is not read as markup and cannot control the terminal.
    """
    moment = datetime.fromtimestamp(told["created_at"]).strftime("%H:%M:%S")
    return Text(f"{moment} {safe(told['message'])}", style=STYLES.get(told["level"], ""))


def metrics_line(metrics: Mapping[str, Any]) -> str:
    """Returns the main metrics of a training step as text, such as `loss 0.5129 margin 0.482 accuracy 97%`. A metric
    without a value is left out."""
    return "  ".join(form.format(metrics[key]) for key, form in SHOWN.items() if metrics.get(key) is not None)


def follow(client: "OpenAI", job_id: str) -> Iterator[dict[str, Any]]:
    """Yields the events that the service streams about a job, until the job ends.

    If the connection breaks, for example because the service restarts, the function reconnects and continues after the
    last event.
    """
    seen: dict[str, str] = {}
    while True:
        client.fine_tuning.jobs.retrieve(job_id)  # raises if the job does not exist or the service does not answer
        headers = {"Authorization": f"Bearer {client.api_key}", **seen}
        url = f"{client.base_url}x/jobs/{job_id}/stream"
        try:
            with httpx.stream("GET", url, headers=headers, timeout=SILENCE_SECONDS) as response:
                if response.is_client_error:
                    response.raise_for_status()
                for line in response.iter_lines():
                    name, _, value = line.partition(": ")
                    if value == "[DONE]":
                        return
                    if name == "id":
                        seen = {"Last-Event-ID": value}
                    elif name == "data":
                        yield json.loads(value)
        except httpx.TransportError:
            pass
        time.sleep(RESUME_SECONDS)


def _advance(bar: Progress, task: TaskID, told: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
    progress = told["progress"]
    if not progress:
        bar.update(task, description=told["status"], completed=0, total=None, detail="")
        return
    parts = [f"{progress['done']}/{progress['total']}"] if progress["total"] else []
    if progress["stage"] == "training":
        parts.append(metrics_line(metrics))
    if encoding := progress.get("encoding"):
        parts.append(f"encoding {encoding['done']}/{encoding['total']}")
    if progress.get("eta_seconds") is not None:
        parts.append(f"{timedelta(seconds=round(progress['eta_seconds']))} left")
    bar.update(
        task,
        description=progress["stage"],
        completed=progress["done"],
        total=progress["total"] or None,
        detail="  ".join(parts),
    )
