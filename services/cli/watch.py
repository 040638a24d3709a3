"""A job's progress as it happens: a bar on a terminal, plain lines in a pipe."""

import time
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

TERMINAL = {"succeeded", "failed", "cancelled"}
POLL_SECONDS = 1.0
PLAIN_SECONDS = 10.0  # between two lines of metrics where there is no terminal
STYLES = {"warn": "yellow", "error": "red"}
SHOWN = {
    "train_loss": "loss {:.4f}",
    "train_reward_margin": "margin {:.3f}",
    "train_reward_accuracy": "accuracy {:.0%}",
}


def watch_job(client: "OpenAI", job_id: str, *, console: Console) -> "FineTuningJob":
    """Show the job's messages and metrics until it ends; returns it as it ended."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[detail]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("waiting", total=None, detail="")
        metrics: Mapping[str, Any] = {}
        seen, printed_at = "", 0.0
        while True:
            job = client.fine_tuning.jobs.retrieve(job_id)  # before its events: none can follow a terminal status
            for event in _events_after(client, job_id, seen):
                seen = event.id
                if event.type == "metrics" and isinstance(event.data, Mapping):
                    metrics = event.data
                    due = not console.is_terminal and time.monotonic() - printed_at > PLAIN_SECONDS
                    if due or metrics.get("step") == metrics.get("total_steps"):
                        printed_at = time.monotonic()
                        steps = f"{metrics.get('step')}/{metrics.get('total_steps')}"
                        console.print(f"step {steps}  {metrics_line(metrics)}")
                else:
                    moment = datetime.fromtimestamp(event.created_at).strftime("%H:%M:%S")
                    console.print(f"{moment} {event.message}", style=STYLES.get(event.level))
            if job.status in TERMINAL:
                return job
            _advance(bar, task, job, metrics)
            time.sleep(POLL_SECONDS)


def metrics_line(metrics: Mapping[str, Any]) -> str:
    """`loss 0.5129  margin 0.482  accuracy 97%`, as far as they are there."""
    return "  ".join(form.format(metrics[key]) for key, form in SHOWN.items() if metrics.get(key) is not None)


def _events_after(client: "OpenAI", job_id: str, seen: str) -> "list[FineTuningJobEvent]":
    """Oldest first. The service lists the newest first."""
    fresh = []
    for event in client.fine_tuning.jobs.list_events(job_id, limit=100):
        if event.id == seen:
            break
        fresh.append(event)
    return fresh[::-1]


def _advance(bar: Progress, task: TaskID, job: "FineTuningJob", metrics: Mapping[str, Any]) -> None:
    progress = ((job.model_extra or {}).get("x_raydpo") or {}).get("progress")
    if not progress:
        bar.update(task, description=job.status, completed=0, total=None, detail="")
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
