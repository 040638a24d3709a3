"""raydpo plan: would a job fit into its workers?"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.client import api_command, out, print_rows
from services.cli.job_request import assignment, compose, local_files, read_config, upload
from services.cli.lists import AsJson

if TYPE_CHECKING:
    from openai import OpenAI


def register(app: typer.Typer) -> None:
    api_command(app)(plan)


def plan(
    client: "OpenAI",
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", exists=True, dir_okay=False, help="As of jobs create. Default: none."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A base model, or a policy to train further. Default: that of --config.")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            help="Training data: a local file, which is uploaded; the id of an uploaded file; or a URI. "
            "Default: that of --config."
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(help="The objective. Default: dpo.", show_default=False)] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any field of the body, as of jobs create. Repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say whether a job would fit into its workers, and what would make it fit. Exit status 1: it would not."""
    base = read_config(config) if config else {}
    named = {"model": model, "training_file": file}
    others = [((name,), value) for name, value in named.items() if value is not None]
    chosen = [assignment(text) for text in sets or ()]
    default = None if base else "dpo"
    body = compose(base, method=method, default=default, hyperparameters={}, others=others, sets=chosen)
    found: Any = client.post("/x/plans", body=upload(client, body, local_files(body)), cast_to=object)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(found)
    if found["fits"] is False:
        raise typer.Exit(1)


def _print(found: dict[str, Any]) -> None:
    beside = ("loading", "checkpoint") if found["device"] == "gpu" else ("loading",)
    rows = [(name, _gb(size)) for name, size in found["parts"].items() if size and name not in beside]
    rows.append(("at most at once", _gb(found["needed_bytes"])))
    if found["worker_bytes"]:
        rows.append((f"there is, for a worker on a {found['device'].upper()}", _gb(found["worker_bytes"])))
    rows.append(("a checkpoint on disk", _gb(found["checkpoint_bytes"])))
    rows.append(("tokens of a pack", found["max_tokens_per_pack"]))
    rows.append(("activation_checkpointing", found["activation_checkpointing"]))
    rows += [(name, found[name]) for name in ("shards", "steps", "tokens") if found[name] is not None]
    print_rows(["of each worker", ""], rows)
    verdict = {True: "It fits.", False: "It does not fit.", None: "Whether it fits is not known."}[found["fits"]]
    for line in (verdict, *found["notes"]):
        out.print(line, markup=False)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3f} GB"
