"""raydpo jobs: train a policy, and watch."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.client import api_command, err, fail, out, print_rows, send_file
from services.cli.logs import read_logs
from services.cli.reading import Columns, MaxInvalidShare, reading
from services.cli.watch import watch_job

if TYPE_CHECKING:
    from openai import OpenAI

app = typer.Typer(no_args_is_help=True, help="Training jobs.")

JobId = Annotated[str, typer.Argument(metavar="ID")]


@api_command(app)
def create(
    client: "OpenAI",
    model: Annotated[str, typer.Option(help="A base model, or a policy to go on from.")],
    file: Annotated[str, typer.Option(help="A local file, which is uploaded, the id of an uploaded one, or a URI.")],
    method: Annotated[
        str, typer.Option(help="The objective: supervised, dpo, ipo, simpo, … as docs/use/objectives.md lists them.")
    ] = "dpo",
    beta: Annotated[float | None, typer.Option(help="dpo: how strongly the reference holds.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per optimizer step, over all workers.")] = None,
    learning_rate: Annotated[float | None, typer.Option()] = None,
    suffix: Annotated[str | None, typer.Option(help="Part of the trained policy's name.")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    workers: Annotated[int | None, typer.Option(help="Ray Train workers.")] = None,
    columns: Columns = None,
    max_invalid_share: MaxInvalidShare = None,
    watch: Annotated[bool, typer.Option("--watch", help="Stay and show progress.")] = False,
) -> None:
    """Submit a job; prints its id."""
    options = {"beta": beta, "n_epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    hyperparameters = {name: value for name, value in options.items() if value is not None}
    how = reading(columns, max_invalid_share)
    request: dict[str, Any] = {
        "model": model,
        "training_file": _file_id(client, file, how),
        "method": {"type": method, method: {"hyperparameters": hyperparameters}},
    }
    request |= {name: value for name, value in {"suffix": suffix, "seed": seed}.items() if value is not None}
    extension: dict[str, Any] = {"num_workers": workers} | ({"dataset": file, **how} if "://" in file else {})
    given = {name: value for name, value in extension.items() if value is not None}
    job = client.fine_tuning.jobs.create(**request, extra_body={"x_raydpo": given} if given else {})
    out.print(job.id)
    if watch:
        _watch(client, job.id)


@api_command(app, "list")
def list_jobs(client: "OpenAI") -> None:
    """All jobs, newest first."""
    rows = [
        (
            job.id,
            job.status,
            job.method.type if job.method else "",
            job.model,
            job.fine_tuned_model or "",
            datetime.fromtimestamp(job.created_at),
        )
        for job in client.fine_tuning.jobs.list()
    ]
    print_rows(["id", "status", "method", "model", "policy", "created"], rows)


@api_command(app)
def show(client: "OpenAI", job_id: JobId) -> None:
    """What is known of a job."""
    out.print_json(client.fine_tuning.jobs.retrieve(job_id).model_dump_json())


@api_command(app)
def watch(client: "OpenAI", job_id: JobId) -> None:
    """Follow a job until it ends: stage, step, loss, margin, accuracy, time left."""
    _watch(client, job_id)


@api_command(app)
def cancel(client: "OpenAI", job_id: JobId) -> None:
    """Stop a job."""
    job = client.fine_tuning.jobs.cancel(job_id)
    out.print(f"{job.id} {job.status}")


@api_command(app)
def pause(client: "OpenAI", job_id: JobId) -> None:
    """Stop a job after the step it is at; it keeps a checkpoint and frees its workers."""
    job = client.fine_tuning.jobs.pause(job_id)
    out.print(f"{job.id} {job.status}")


@api_command(app)
def resume(client: "OpenAI", job_id: JobId) -> None:
    """Let a paused job go on where it was."""
    job = client.fine_tuning.jobs.resume(job_id)
    out.print(f"{job.id} {job.status}")


@api_command(app)
def logs(
    client: "OpenAI",
    job_id: JobId,
    attempt: Annotated[int | None, typer.Option(help="Default: the newest.")] = None,
    source: Annotated[str, typer.Option(help="driver, worker-0, worker-1, …")] = "driver",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay until the job ends.")] = False,
) -> None:
    """What driver and workers of a job printed."""
    for line in read_logs(client, job_id, attempt=attempt, source=source, follow=follow):
        out.print(line, markup=False)


def _file_id(client: "OpenAI", file: str, how: Mapping[str, Any]) -> str:
    path = Path(file)
    if path.is_file():
        stored = send_file(client, path, how)
        err.print(f"{file} uploaded as {stored.id}")
        return stored.id
    if not file.startswith("file-") and "://" not in file:
        fail(f"{file} is neither a local file nor the id of an uploaded one, nor a URI.")
    if how and "://" not in file:
        fail(f"{file} is uploaded already: how its rows are read was said then. Send the file again.")
    return file


def _watch(client: "OpenAI", job_id: str) -> None:
    try:
        job = watch_job(client, job_id, console=out)
    except KeyboardInterrupt:
        err.print(f"The job goes on. Come back with: raydpo jobs watch {job_id}")
        raise typer.Exit(130) from None
    if job.status != "succeeded":
        fail(job.error.message if job.error and job.error.message else f"The job is {job.status}.")
    out.print(f"policy: {job.fine_tuned_model}")
