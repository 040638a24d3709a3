"""The `raydpo rounds` commands: create, list, show, pause, resume, cancel and delete rounds, which improve a policy by
training on its own scored answers.
"""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.status import Status

from services.cli.client import api_command, err, fail, id_argument, out, print_rows, safe, send_file
from services.cli.jobs.request import Body, assign, assignment, read_config
from services.cli.lists import AsJson, Item, date, list_command
from services.cli.models.evaluations import judge_of

if TYPE_CHECKING:
    from openai import OpenAI

app = typer.Typer(
    no_args_is_help=True,
    help="Improve a policy in rounds. Each round samples answers, scores them, trains the policy on the better and "
    "worse ones, and evaluates it.",
)

RoundsId = Annotated[str, id_argument("Id of the rounds, such as rounds-1a2b….")]

LOOK_SECONDS = 2.0


@api_command(app)
def create(
    client: "OpenAI",
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="YAML, TOML or JSON file with the body of POST /x/rounds. The other options override the file's "
            "fields. Default: none.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Name of the policy that the rounds start from: a base model or a trained policy. Default: the policy "
            "of --config."
        ),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            help="File with the prompts to sample answers to: a local file, which is uploaded, or the id of an "
            "uploaded file. Default: the file of --config."
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="What scores the answers: the name of a model or of a judge that the operator offers, `implicit` (the "
            "newest policy's implicit reward), `length` (number of words), `exact` (1 if the answer equals the "
            "row's best completion), or `regex:PATTERN` (1 if the pattern matches). Default: the judge of --config."
        ),
    ] = None,
    criteria: Annotated[
        str | None,
        typer.Option(
            help="Criteria, in words, by which the judge decides which answer is better. Only for a judge that is "
            "asked, not for a reward model or a rule. Default: the service's criteria."
        ),
    ] = None,
    num_rounds: Annotated[int | None, typer.Option(help="Maximum number of rounds. Default: 3.", min=1)] = None,
    num_samples: Annotated[
        int | None, typer.Option(help="Number of answers to each prompt. Default: 4.", min=2)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Maximum number of tokens of an answer. Default: 512.", min=1)
    ] = None,
    selection: Annotated[
        Literal["best_worst", "all_pairs", "ranking", "rso"] | None,
        typer.Option(
            help="Which answers to a prompt become training data. best_worst: one pair, of the best and the worst "
            "answer. all_pairs: each two answers with different scores. ranking: all answers with their scores. rso: "
            "pairs of the answers that rejection sampling accepts. Default: best_worst.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Training objective of each round's job; `raydpo methods` lists the objectives. Default: dpo.",
            show_default=False,
        ),
    ] = None,
    start: Annotated[
        Literal["newest", "first"] | None,
        typer.Option(
            help="Policy from which each round's job starts: the newest one, or the first one (--model). Default: "
            "newest.",
            show_default=False,
        ),
    ] = None,
    reference: Annotated[
        Literal["newest", "first"] | None,
        typer.Option(
            help="Reference model of each round's job: the newest policy, or the first one (--model). Default: first.",
            show_default=False,
        ),
    ] = None,
    evaluation_file: Annotated[
        str | None,
        typer.Option(
            help="File with prompts on which each policy is evaluated: a local file, which is uploaded, or the id of "
            "an uploaded file. Default: the prompts of --file."
        ),
    ] = None,
    stop_if_not_better: Annotated[
        bool,
        typer.Option(
            "--stop-if-not-better",
            help="End early, after a round whose policy is not better than the best policy before it.",
        ),
    ] = False,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Sets a field of the request's body, such as job.x_raydpo.num_workers=2 or job.method.dpo.beta=0.5. "
            "VALUE is YAML; null removes the field. Repeatable; overrides all other options.",
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Wait until the rounds have ended, and print their results.")
    ] = False,
) -> None:
    """Create rounds, which improve a policy by training it on its own answers, and print their id. The service works on
    them in the background.
    """
    body: Body = read_config(config) if config else {}
    given = {
        ("model",): model,
        ("file",): file,
        ("judge",): judge_of(judge, criteria, {}),
        ("num_rounds",): num_rounds,
        ("num_samples",): num_samples,
        ("sampling", "max_tokens"): max_tokens,
        ("selection",): selection and {"type": selection},
        ("job", "method", "type"): method,
        ("start",): start,
        ("reference",): reference,
        ("evaluation", "file"): evaluation_file,
        ("stop_if_not_better",): stop_if_not_better or None,
    }
    if criteria is not None and judge is None:
        given["judge", "criteria"] = criteria
    for path, value in given.items():
        if value is not None:
            assign(body, path, value)
    for text in sets or ():
        of_job = text.startswith("job.")
        path, value = assignment(text.removeprefix("job."))
        assign(body, ("job", *path) if of_job else path, value)
    if isinstance(told := body.get("job"), dict) and isinstance(told.setdefault("method", {}), dict):
        told["method"].setdefault("type", "dpo")
    for part in (body, body.get("evaluation")):
        if isinstance(part, dict) and isinstance(named := part.get("file"), str) and Path(named).is_file():
            part["file"] = send_file(client, Path(named), {}).id
    created: Any = client.post("/x/rounds", body=body, cast_to=object)
    out.print(created["id"])
    if watch:
        found = wait_until_ended(client, created["id"])
        print_rounds(found)
        if found["status"] != "succeeded":
            fail(found["error"]["message"] if found["error"] else f"the rounds were {found['status']}.")


def wait_until_ended(client: "OpenAI", rounds_id: str) -> Item:
    """Waits until the set of rounds has ended, and returns its JSON object. On a terminal, shows the current stage
    meanwhile."""
    with Status("", console=err) as status:
        while True:
            found: Any = client.get(f"/x/rounds/{rounds_id}", cast_to=object)
            if found["status"] not in ("running", "paused"):
                return dict(found)
            status.update(safe(_state(found)))
            time.sleep(LOOK_SECONDS)


def _state(item: Item) -> str:
    parts = [item["status"]]
    if item["stage"]:
        parts.append(f"round {item['rounds'][-1]['number']}, {item['stage']}")
    if item["waits_for"]:
        parts.append(f"waits: {item['waits_for']}")
    if item["end_reason"]:
        parts.append(item["end_reason"].replace("_", " "))
    if item["error"]:
        parts.append(item["error"]["message"])
    return ", ".join(parts)


list_command(
    app,
    "/x/rounds",
    "List all rounds, newest first.",
    {"id": "id", "model": "model", "state": _state, "created": date("created_at")},
)


@api_command(app)
def show(client: "OpenAI", rounds_id: RoundsId, as_json: AsJson = False) -> None:
    """Show the state of rounds, and for each round its training rows, its job, its policy and its results."""
    found: Any = client.get(f"/x/rounds/{rounds_id}", cast_to=object)
    if as_json:
        out.print_json(data=found)
    else:
        print_rounds(found)


@api_command(app)
def pause(client: "OpenAI", rounds_id: RoundsId) -> None:
    """Pause rounds, and the job or the evaluations that they have under way."""
    client.post(f"/x/rounds/{rounds_id}/pause", cast_to=object)
    out.print(f"paused {rounds_id}")


@api_command(app)
def resume(client: "OpenAI", rounds_id: RoundsId) -> None:
    """Continue paused rounds at the stage that they had reached."""
    client.post(f"/x/rounds/{rounds_id}/resume", cast_to=object)
    out.print(f"resumed {rounds_id}")


@api_command(app)
def cancel(client: "OpenAI", rounds_id: RoundsId) -> None:
    """Cancel rounds, and the job or the evaluations that they have under way. What the rounds have made so far is
    kept.
    """
    client.post(f"/x/rounds/{rounds_id}/cancel", cast_to=object)
    out.print(f"cancelled {rounds_id}")


@api_command(app)
def delete(client: "OpenAI", rounds_id: RoundsId) -> None:
    """Delete rounds that have ended. The files, jobs, models and evaluations that they have made stay."""
    client.delete(f"/x/rounds/{rounds_id}", cast_to=object)
    out.print(f"deleted {rounds_id}")


def print_rounds(item: Item) -> None:
    """Prints the state of a set of rounds and its best policy, and a table with a line for each round."""
    print_rows(["", ""], [("rounds", item["id"]), ("state", _state(item)), ("best", item["model"])])
    headings = ["round", "score", "win rate", "KL", "rows", "file", "job", "policy", "evaluations"]
    print_rows(headings, [list(_cells(entry)) for entry in item["rounds"]])


def _cells(entry: Mapping[str, Any]) -> Iterator[object]:
    yield entry["number"]
    for name, form in (("score", "{:.4g}"), ("win_rate", "{:.1%}"), ("kl", "{:.4g}")):
        found = entry[name]
        yield "{} ({} to {})".format(*(form.format(found[end]) for end in ("value", "low", "high"))) if found else ""
    yield (entry["rows"] or {}).get("num_rows", "")
    yield from (entry[name] or "" for name in ("file", "job", "model"))
    yield " ".join(filter(None, (entry["samples"], *entry["evaluations"].values())))
