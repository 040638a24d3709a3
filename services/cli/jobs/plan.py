"""The `raydpo plan` command: find out whether a job would fit into its workers' memory."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.client import api_command, out, print_rows
from services.cli.jobs.request import (
    Assignments,
    ConfigFile,
    assignment,
    compose,
    local_files,
    read_config,
    upload,
    validate,
)
from services.cli.lists import AsJson

if TYPE_CHECKING:
    from openai import OpenAI


def register(app: typer.Typer) -> None:
    api_command(app)(plan)


def plan(
    client: "OpenAI",
    config: ConfigFile = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Name of the base model to train, or of a trained policy to train further. "
            "Default: the model of --config."
        ),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            help="Training data: a local file, which is uploaded; the id of an uploaded file; or a URI, such as "
            "https://host/pairs.jsonl. Default: the training data of --config."
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Training objective; `raydpo methods` lists the objectives. "
            "Default: the objective of --config; without --config, dpo.",
            show_default=False,
        ),
    ] = None,
    sets: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """Report whether a job would fit into its workers' memory, and which changes would make the job fit.

    The command exits with status 1 if the job would not fit.
    """
    base = read_config(config) if config else {}
    named = {"model": model, "training_file": file}
    others = [((name,), value) for name, value in named.items() if value is not None]
    chosen = [assignment(text) for text in sets or ()]
    default = None if base else "dpo"
    body = compose(base, method=method, default=default, hyperparameters={}, others=others, sets=chosen)
    local = local_files(body)
    validate(client, body, local)
    found: Any = client.post("/x/plans", body=upload(client, body, local), cast_to=object)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(found)
    if found["fits"] is False:
        raise typer.Exit(1)


def _print(found: dict[str, Any]) -> None:
    beside = ("loading", "checkpoint") if found["device"] == "gpu" else ("loading",)
    rows = [(name, _gb(size)) for name, size in found["parts"].items() if size and name not in beside]
    rows.append(("peak memory", _gb(found["needed_bytes"])))
    if found["worker_bytes"]:
        rows.append((f"available memory, {found['device'].upper()}", _gb(found["worker_bytes"])))
    rows.append(("a checkpoint on disk", _gb(found["checkpoint_bytes"])))
    rows.append(("tokens in a forward pass", found["max_tokens_per_pack"]))
    rows.append(("activation_checkpointing", found["activation_checkpointing"]))
    rows += [(name, found[name]) for name in ("shards", "steps", "tokens") if found[name] is not None]
    print_rows(["of each worker", ""], rows)
    verdict = {True: "The job fits.", False: "The job does not fit.", None: "Whether the job fits is not known."}[
        found["fits"]
    ]
    for line in (verdict, *found["notes"]):
        out.print(line, markup=False)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3f} GB"
