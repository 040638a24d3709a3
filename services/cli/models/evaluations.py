"""The `raydpo evaluations` commands: create, list, show, pause, resume, cancel, delete and download evaluations of
policies.
"""

import csv
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.status import Status

from services.cli.client import api_command, err, fail, id_argument, out, print_rows, safe, send_file
from services.cli.lists import AsJson, Item, date, list_command
from services.cli.reading import Columns, reading

if TYPE_CHECKING:
    from openai import OpenAI

app = typer.Typer(
    no_args_is_help=True,
    help="Evaluate a model: how good its answers are, alone or against another model, and how far it is from its "
    "reference model.",
)

EvaluationId = Annotated[str, id_argument("Id of the evaluation, such as evaluation-1a2b….")]

LOOK_SECONDS = 1.0
SHARES = {  # the results that are printed as percentages
    "win_rate",
    "length_controlled_win_rate",
    "order_disagreement",
    "agreement",
    "accuracy",
    "repetition",
    "unfinished",
}


@api_command(app)
def create(
    client: "OpenAI",
    kind: Annotated[
        Literal["compare", "score", "samples", "preferences", "drift"],
        typer.Argument(
            help="What to find out. `compare`: which of two models answers better. `score`: how good the answers of "
            "one model are. `samples`: how good the best of several answers to each prompt is. `preferences`: whether "
            "the model prefers the completions that people preferred. `drift`: how far the model has moved from its "
            "reference model."
        ),
    ],
    model: Annotated[str, typer.Option(help="Name of the policy, checkpoint or base model to evaluate.")],
    file: Annotated[
        str,
        typer.Option(
            help="File with the prompts to evaluate on: a local file, which is uploaded, or the id of an uploaded file."
        ),
    ],
    baseline: Annotated[
        str | None,
        typer.Option(help="For `compare`: name of the model to compare with. Default: the policy's base model."),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="What judges the answers: the name of a model or of a judge that the operator offers, `implicit` "
            "(the implicit reward of the model that is evaluated), `length` (number of words), `exact` (1 if the "
            "answer, without white space at its ends, equals the row's best completion), or `regex:PATTERN` (1 if the "
            "pattern matches). The evaluations `compare`, `score` and `samples` need a judge; in `score`, a model that "
            "is no reward model gives grades from 1 to 10. Default: none."
        ),
    ] = None,
    criteria: Annotated[
        str | None,
        typer.Option(
            help="Criteria, in words, by which the judge decides how good an answer is. Only for a judge that is "
            "asked, not for a reward model or a rule. Default: the service's criteria."
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="For `preferences`, `drift` and the judge `implicit`: name of the reference model. Default: the "
            "reference model of the job that trained the policy."
        ),
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(
            help="For `preferences` and the judge `implicit`: factor by which log-ratios are multiplied to give "
            "rewards. Default: beta of the job that trained the policy."
        ),
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(help="For `samples`: number of answers to each prompt. Default: 4.", min=2)
    ] = None,
    max_items: Annotated[
        int | None,
        typer.Option(help="Maximum number of rows to take, from the first row of the file on. Default: 200.", min=1),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Maximum number of tokens of an answer. Default: 512.", min=1)
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Sampling temperature of the answers; 0 always takes the most likely token. Default: 1.", min=0
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed with which answers are sampled. Default: 0.", min=0)] = None,
    columns: Columns = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Wait until the evaluation has ended, and print its results.")
    ] = False,
) -> None:
    """Create an evaluation and print its id. The service works on it in the background."""
    implicit = {"reference": reference, "beta": beta}
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    body: dict[str, Any] = {
        "kind": kind,
        "model": model,
        "baseline": baseline,
        "judge": judge_of(judge, criteria, implicit),
        **({} if judge == "implicit" else implicit),
        "num_samples": num_samples,
        "max_items": max_items,
        "sampling": {name: value for name, value in sampling.items() if value is not None} or None,
        "file": send_file(client, Path(file), reading(columns, None)).id if Path(file).is_file() else file,
    }
    given = {name: value for name, value in body.items() if value is not None}
    created: Any = client.post("/x/evaluations", body=given, cast_to=object)
    out.print(created["id"])
    if watch:
        found = wait_until_ended(client, created["id"])
        print_evaluation(found)
        if found["status"] != "succeeded":
            fail(found["error"]["message"] if found["error"] else f"the evaluation was {found['status']}.")


def judge_of(judge: str | None, criteria: str | None, implicit: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the field `judge` of a request for the options --judge and --criteria, whose values are `judge` and
    `criteria`. Returns None without the option --judge.

    `implicit` holds the fields of the judge `implicit`; those that are None are left out.
    """
    if judge is None:
        return None
    kind, _, pattern = judge.partition(":")
    if kind == "regex":
        asked = {"type": "regex", "pattern": pattern}
    elif judge == "implicit":
        asked = {"type": judge, **{name: value for name, value in implicit.items() if value is not None}}
    else:
        asked = {"type": judge} if judge in ("length", "exact") else {"type": "model", "model": judge}
    return asked | ({"criteria": criteria} if criteria else {})


def wait_until_ended(client: "OpenAI", evaluation_id: str) -> Item:
    """Waits until the evaluation has ended, and returns the evaluation. On a terminal, shows the progress meanwhile."""
    with Status("", console=err) as status:
        while True:
            found: Any = client.get(f"/x/evaluations/{evaluation_id}", cast_to=object)
            if found["status"] not in ("queued", "running", "paused"):
                return dict(found)
            status.update(safe(_state(found)))
            time.sleep(LOOK_SECONDS)


def _state(item: Item) -> str:
    parts = [item["status"]]
    if item["status"] == "running":
        parts.append(f"{item['progress']:.0%}")
        if item["waits_for"]:
            parts.append(f"waits: {item['waits_for']}")
        elif item["estimated_finish"]:
            parts.append(f"until {datetime.fromtimestamp(item['estimated_finish']).strftime('%H:%M:%S')}")
    if item["num_failed"]:
        parts.append(f"{item['num_failed']} of {item['num_items']} items failed")
    if item["error"]:
        parts.append(item["error"]["message"])
    return ", ".join(parts)


list_command(
    app,
    "/x/evaluations",
    "List all evaluations, newest first.",
    {"id": "id", "kind": "kind", "model": "model", "state": _state, "created": date("created_at")},
)


@api_command(app)
def show(
    client: "OpenAI",
    evaluation_id: EvaluationId,
    as_json: AsJson = False,
    form: Annotated[
        Literal["table", "csv"],
        typer.Option(
            "--format",
            help="Format of the output: a table for people, or CSV for spreadsheets. The CSV has the results only, in "
            "the columns `name`, `value`, `low` and `high`.",
        ),
    ] = "table",
) -> None:
    """Show the state of an evaluation, and its results with their 95% intervals."""
    if as_json and form == "csv":
        fail("the output is JSON or CSV; leave out --json or --format csv.")
    found: Any = client.get(f"/x/evaluations/{evaluation_id}", cast_to=object)
    if as_json:
        out.print_json(data=found)
    elif form == "csv":
        if found["results"] is None:
            fail(f"the evaluation {evaluation_id} has no results: it is {_state(found)}.")
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(["name", "value", "low", "high"])
        writer.writerows([".".join(path), *numbers] for path, *numbers in flat(found["results"]))
    else:
        print_evaluation(found)


@api_command(app)
def pause(client: "OpenAI", evaluation_id: EvaluationId) -> None:
    """Pause an evaluation. The answers, verdicts and scores so far are kept."""
    client.post(f"/x/evaluations/{evaluation_id}/pause", cast_to=object)
    out.print(f"paused {evaluation_id}")


@api_command(app)
def resume(client: "OpenAI", evaluation_id: EvaluationId) -> None:
    """Continue a paused evaluation where it stopped. Finished prompts are not evaluated again."""
    client.post(f"/x/evaluations/{evaluation_id}/resume", cast_to=object)
    out.print(f"resumed {evaluation_id}")


@api_command(app)
def cancel(client: "OpenAI", evaluation_id: EvaluationId) -> None:
    """Cancel an evaluation that has not ended. The answers, verdicts and scores so far are kept."""
    client.post(f"/x/evaluations/{evaluation_id}/cancel", cast_to=object)
    out.print(f"cancelled {evaluation_id}")


@api_command(app)
def delete(client: "OpenAI", evaluation_id: EvaluationId) -> None:
    """Delete an evaluation that has ended, with its answers, verdicts, scores and results."""
    client.delete(f"/x/evaluations/{evaluation_id}", cast_to=object)
    out.print(f"deleted {evaluation_id}")


@api_command(app)
def items(
    client: "OpenAI",
    evaluation_id: EvaluationId,
    form: Annotated[
        Literal["jsonl", "csv"],
        typer.Option("--format", help="Format of the output: JSON Lines, or CSV for spreadsheets."),
    ] = "jsonl",
) -> None:
    """Write all items of an evaluation to standard output: prompts, answers, verdicts and scores."""
    import httpx

    path = f"/x/evaluations/{evaluation_id}/content"
    answer = client.get(path, cast_to=httpx.Response, options={"params": {"format": form}})
    sys.stdout.buffer.write(answer.content)


def print_evaluation(item: Item) -> None:
    """Prints an evaluation's models, judge and state, and its results with their 95% intervals, as a table."""
    what = [("evaluation", item["id"]), ("kind", item["kind"]), ("model", item["model"])]
    what += [(name, item["request"][name]) for name in ("baseline", "reference") if item["request"].get(name)]
    if judge := item["request"].get("judge"):
        what.append(("judge", judge.get("model") or " ".join(filter(None, (judge["type"], judge.get("pattern"))))))
    rows = [(name, value, "") for name, value in (*what, ("state", _state(item)))]
    print_rows(["", "", "95% interval"], [*rows, *result_rows(item["results"] or {})])


def result_rows(results: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yields the name, the value and the 95% interval of each result of an evaluation, as texts.

    A result that is null is left out. The text of the interval is empty for a result without an interval.
    """
    for path, value, low, high in flat(results):
        form = "{:.1%}" if path[-1] in SHARES else "{:.4g}"
        if value is not None:
            text = value if isinstance(value, str) else form.format(value)
            interval = "" if low is None else f"{form} to {form}".format(low, high)
            yield " ".join(path).replace("_", " "), text, interval


def flat(results: Mapping[str, Any], *where: str) -> Iterator[tuple[tuple[str, ...], Any, Any, Any]]:
    """Yields each result of an evaluation as its path in `results`, its value, and the two ends of its 95% interval.
    The ends are None for a result without an interval. The paths begin with `where`.
    """
    for name, value in results.items():
        path = (*where, name)
        if not isinstance(value, dict):
            yield path, value, None, None
        elif value.keys() == {"value", "low", "high"}:
            yield path, value["value"], value["low"], value["high"]
        else:
            yield from flat(value, *path)
