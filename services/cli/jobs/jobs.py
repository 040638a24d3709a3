"""The `raydpo jobs` commands: submit training jobs and follow them."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.client import api_command, err, fail, id_argument, out, safe, write_content
from services.cli.jobs.logs import read_logs
from services.cli.jobs.request import (
    Assignments,
    ConfigFile,
    assignment,
    compose,
    local_files,
    plan_unsent,
    read_config,
    upload,
    validate,
)
from services.cli.jobs.watch import metrics_line, watch_job
from services.cli.lists import AsJson, Limit, date, list_command, show_list
from services.cli.lists import Columns as Table
from services.cli.reading import Columns, MaxInvalidShare, reading

if TYPE_CHECKING:
    from openai import OpenAI

app = typer.Typer(no_args_is_help=True, help="Submit training jobs and follow them.")

JobId = Annotated[str, id_argument("Id of the job, such as ftjob-1a2b….")]


@api_command(app)
def create(
    client: "OpenAI",
    config: ConfigFile = None,
    again: Annotated[
        str | None,
        typer.Option(
            metavar="JOB",
            help="Id of an earlier job to repeat with the same request and seed. "
            "The other options override that request's fields. Default: none.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Name of the base model to train, or of a trained policy to train further. "
            "Default: the model of --config or --again."
        ),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            help="Training data: a local file, which is uploaded; the id of an uploaded file; or a URI, such as "
            "https://host/pairs.jsonl. Default: the training data of --config or --again."
        ),
    ] = None,
    validation_file: Annotated[
        str | None,
        typer.Option(
            help="Validation data: a local file, which is uploaded, or the id of an uploaded file. "
            "Default: the validation data of --config or --again, if any."
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Training objective; `raydpo methods` lists the objectives. "
            "Default: the objective of --config or --again; without either, dpo.",
            show_default=False,
        ),
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(
            help="Hyperparameter beta of the training objective. In DPO, a larger beta keeps the policy closer to the "
            "reference model. Default: the objective's default."
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Number of passes over the training data. Default: the objective's default.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Rows per optimizer step, over all workers together. "
            "Default: a fiftieth of the training rows, but at least 8 and at most 64."
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate, at most 1. Default: the objective's default.")
    ] = None,
    suffix: Annotated[
        str | None,
        typer.Option(
            help="Label to include in the trained policy's name, as in ft:qwen:org:LABEL:1a2b…. Default: none."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the random order of the training rows. Default: a random seed.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Number of processes that train the policy together. Default: 1.")
    ] = None,
    columns: Columns = None,
    max_invalid_share: MaxInvalidShare = None,
    sets: Assignments = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the request, the job that it would create, and whether this job would fit into memory; upload "
            "no file and submit no job.",
        ),
    ] = False,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Show the job's progress until the job ends, instead of exiting immediately."),
    ] = False,
) -> None:
    """Submit a training job and print the job's id. The service checks the request before any file is uploaded."""
    if config and again:
        fail("--config and --again each give a whole request; give one of them, and change its fields with --set.")
    base = read_config(config) if config else _request_of(client, again) if again else {}
    hyperparameters = {"beta": beta, "n_epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    fields = {"model": model, "training_file": file, "validation_file": validation_file, "suffix": suffix, "seed": seed}
    extension = {"num_workers": workers, **reading(columns, max_invalid_share)}
    body = compose(
        base,
        method=method,
        default=None if base else "dpo",
        hyperparameters={name: value for name, value in hyperparameters.items() if value is not None},
        others=[
            *(((name,), value) for name, value in fields.items() if value is not None),
            *((("x_raydpo", name), value) for name, value in extension.items() if value is not None),
        ],
        sets=[assignment(text) for text in sets or ()],
    )
    local = local_files(body)
    job = validate(client, body, local)
    if dry_run:
        out.print_json(data={"request": body, "job": job, "plan": plan_unsent(client, body, local)})
        return
    created: Any = client.post("/fine_tuning/jobs", body=upload(client, body, local), cast_to=object)
    out.print(created["id"])
    if watch:
        _watch(client, created["id"])


def _request_of(client: "OpenAI", job_id: str) -> dict[str, Any]:
    job: Any = client.get(f"/fine_tuning/jobs/{job_id}", cast_to=object)
    return dict(job["x_raydpo"]["request"])


list_command(
    app,
    "/fine_tuning/jobs",
    "List all jobs, newest first.",
    {
        "id": "id",
        "status": "status",
        "method": lambda job: job["method"]["type"],
        "model": "model",
        "policy": lambda job: job["fine_tuned_model"] or "",
        "created": date("created_at"),
    },
)


@api_command(app)
def show(client: "OpenAI", job_id: JobId) -> None:
    """Show all fields of a job as JSON."""
    out.print_json(client.fine_tuning.jobs.retrieve(job_id).model_dump_json())


@api_command(app)
def events(client: "OpenAI", job_id: JobId, limit: Limit = 20, as_json: AsJson = False) -> None:
    """List a job's events, newest first: messages from the service and the training, and the metrics of each step."""
    path = f"/fine_tuning/jobs/{job_id}/events"
    show_list(client, path, {"when": date("created_at"), "level": "level", "message": "message"}, limit, as_json)


@api_command(app)
def checkpoints(client: "OpenAI", job_id: JobId, limit: Limit = 20, as_json: AsJson = False) -> None:
    """List the checkpoints of a job, newest first. Each checkpoint is a model that can be queried."""
    shown: Table = {
        "id": "id",
        "step": "step_number",
        "model": "fine_tuned_model_checkpoint",
        "metrics": lambda checkpoint: metrics_line(checkpoint["metrics"]),
    }
    show_list(client, f"/fine_tuning/jobs/{job_id}/checkpoints", shown, limit, as_json)


@api_command(app)
def metrics(
    client: "OpenAI",
    job_id: JobId,
    points: Annotated[
        int,
        typer.Option(
            help="Maximum number of rows of the table. If the job has more training steps, each row is the mean of "
            "several steps.",
            min=1,
            max=10_000,
        ),
    ] = 50,
    as_json: AsJson = False,
) -> None:
    """Show a job's loss, reward margin and reward accuracy by training step. --json prints every metric."""
    found: Any = client.get(f"/x/jobs/{job_id}/metrics", cast_to=object, options={"params": {"resolution": points}})
    if as_json:
        out.print_json(data=found)
        return
    means = {name: column["mean"] for name, column in found["metrics"].items()}
    for index, step in enumerate(found["steps"]):
        out.print(f"step {step}  {metrics_line({name: column[index] for name, column in means.items()})}")


@api_command(app)
def results(client: "OpenAI", job_id: JobId) -> None:
    """Write a succeeded job's result file to standard output: a CSV file with every metric of every training step."""
    job = client.fine_tuning.jobs.retrieve(job_id)
    if not job.result_files:
        fail(
            f"{job_id} is {job.status} and has no result file; `raydpo jobs metrics {job_id}` shows the metrics so far."
        )
    for file_id in job.result_files:
        write_content(client, file_id)


@api_command(app)
def watch(client: "OpenAI", job_id: JobId) -> None:
    """Show a job's stage, step, loss, reward margin, reward accuracy and time left until the job ends."""
    _watch(client, job_id)


@api_command(app)
def cancel(client: "OpenAI", job_id: JobId) -> None:
    """Cancel a job. A cancelled job keeps its checkpoints, but cannot be resumed."""
    job = client.fine_tuning.jobs.cancel(job_id)
    out.print(f"{job.id} {job.status}")


@api_command(app)
def pause(client: "OpenAI", job_id: JobId) -> None:
    """Pause a job after the current training step. The job saves a checkpoint and frees its workers."""
    job = client.fine_tuning.jobs.pause(job_id)
    out.print(f"{job.id} {job.status}")


@api_command(app)
def resume(client: "OpenAI", job_id: JobId) -> None:
    """Resume a paused job from its checkpoint."""
    job = client.fine_tuning.jobs.resume(job_id)
    out.print(f"{job.id} {job.status}")


@api_command(app)
def delete(
    client: "OpenAI",
    job_id: JobId,
    models: Annotated[
        bool,
        typer.Option("--models", help="Also delete the job's policy and the models of its checkpoints."),
    ] = False,
) -> None:
    """Delete a job that has ended, with its events, metrics, logs and result file. Its models stay, unless --models is
    given."""
    deleted: Any = client.delete(
        f"/x/jobs/{job_id}", cast_to=object, options={"params": {"models": models} if models else {}}
    )
    out.print(f"deleted {job_id}")
    if deleted["models"]:
        err.print(f"Its models stay: {', '.join(deleted['models'])}. `raydpo models delete MODEL` deletes one.")


@api_command(app)
def logs(
    client: "OpenAI",
    job_id: JobId,
    attempt: Annotated[
        int | None,
        typer.Option(help="Number of the job's attempt, from 1, whose logs are printed. Default: the newest attempt."),
    ] = None,
    source: Annotated[
        str, typer.Option(help="Process whose logs are printed: driver, worker-0, worker-1 and so on.")
    ] = "driver",
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Continue to print new lines until the job ends.")
    ] = False,
) -> None:
    """Print the logs of one of a job's processes: the driver (the job's main program) or a training worker."""
    for line in read_logs(client, job_id, attempt=attempt, source=source, follow=follow):
        out.print(safe(line))


def _watch(client: "OpenAI", job_id: str) -> None:
    try:
        job = watch_job(client, job_id, console=out)
    except KeyboardInterrupt:
        err.print(f"The job continues. To watch the job again, run: raydpo jobs watch {job_id}")
        raise typer.Exit(130) from None
    if job.status != "succeeded":
        fail(job.error.message if job.error and job.error.message else f"The job is {job.status}.")
    out.print(f"policy: {job.fine_tuned_model}")
