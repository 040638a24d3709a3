"""The `raydpo sweeps` commands: create, list, show, cancel, delete and draw sweeps, which are jobs that differ in
chosen options.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.status import Status

from services.cli.client import api_command, err, fail, id_argument, out, print_rows, safe, send_file
from services.cli.jobs import frontier_picture
from services.cli.jobs.request import Body, all_beside, beside, local_files, read_fields, upload
from services.cli.lists import AsJson, Item, date, list_command

if TYPE_CHECKING:
    from openai import OpenAI

app = typer.Typer(
    no_args_is_help=True,
    help="Train many jobs that differ in chosen options, and compare the policies: their rewards, and how far they "
    "moved from the reference model.",
)

SweepId = Annotated[str, id_argument("Id of the sweep, such as sweep-1a2b….")]
LOOK_SECONDS = 1.0
MOST_TRIALS = 256  # of a sweep


@api_command(app)
def create(
    client: "OpenAI",
    config: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="YAML, TOML or JSON file with the body of POST /x/sweeps. Data files that it names are uploaded.",
        ),
    ],
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Wait until the sweep has ended, and print its trials (jobs with chosen values)."),
    ] = False,
) -> None:
    """Create a sweep and print its id. The service submits its jobs in the background."""
    created: Any = client.post("/x/sweeps", body=_with_files(client, config), cast_to=object)
    out.print(created["id"])
    if watch:
        found = _wait_until_ended(client, created["id"])
        _print_sweep(client, found)
        if found["status"] != "succeeded":
            fail(found["error"]["message"] if found["error"] else f"the sweep was {found['status']}.")


def _with_files(client: "OpenAI", config: Path) -> Body:
    """Reads the config file, uploads the local data files that it names, and returns the request body with the files'
    ids.
    """
    body = read_fields(config, "POST /x/sweeps into the file, such as `job` and `parameters`")
    job, sent = body.get("job"), dict[str, str]()
    if isinstance(job, dict):
        job = all_beside(config, job)
        body["job"] = upload(client, job, local_files(job))
    evaluations = body.get("evaluations")
    if isinstance(evaluations, dict):
        body["evaluations"] = {name: _sent(client, config, each, sent) for name, each in evaluations.items()}
    return body


def _sent(client: "OpenAI", config: Path, evaluation: Any, sent: dict[str, str]) -> Any:
    """Uploads the local file that an evaluation of the sweep names, if it names one, and returns the evaluation with
    the file's id in place of the path.

    `sent` maps the paths of the files that were uploaded so far to their ids. A file in `sent` is not uploaded again.
    """
    if not isinstance(evaluation, dict):
        return evaluation
    found = beside(config, evaluation, "file")
    path = found.get("file")
    if not isinstance(path, str) or not Path(path).is_file():
        return found
    if path not in sent:
        sent[path] = send_file(client, Path(path), {}).id
        err.print(f"{path} uploaded as {sent[path]}")
    return found | {"file": sent[path]}


def _wait_until_ended(client: "OpenAI", sweep_id: str) -> Item:
    """Waits until the sweep has ended, and returns the sweep. On a terminal, shows the sweep's state meanwhile."""
    with Status("", console=err) as status:
        while True:
            found: Any = client.get(f"/x/sweeps/{sweep_id}", cast_to=object)
            if found["status"] != "running":
                return dict(found)
            status.update(safe(_state(found)))
            time.sleep(LOOK_SECONDS)


def _state(item: Item) -> str:
    begun = sum(item["trials"].values())
    counts = [f"{count} {state}" for state, count in sorted(item["trials"].items())]
    parts = [item["status"], f"{begun} of {item['num_trials']} trials", *counts]
    if item["waits_for"]:
        parts.append(f"waits: {item['waits_for']}")
    if item["error"]:
        parts.append(item["error"]["message"])
    return ", ".join(parts)


list_command(
    app,
    "/x/sweeps",
    "List all sweeps, newest first.",
    {
        "id": "id",
        "search": lambda item: item["request"]["search"]["type"],
        "parameters": lambda item: " ".join(_names(list(item["request"]["parameters"]))),
        "state": _state,
        "created": date("created_at"),
    },
)


@api_command(app)
def show(client: "OpenAI", sweep_id: SweepId, as_json: AsJson = False) -> None:
    """Show the trials (jobs) of a sweep: the values, the job and the results of each, the best trial first."""
    found: Any = client.get(f"/x/sweeps/{sweep_id}", cast_to=object)
    if as_json:
        out.print_json(data=found | {"data": _trials(client, sweep_id)})
    else:
        _print_sweep(client, found)


@api_command(app)
def cancel(client: "OpenAI", sweep_id: SweepId) -> None:
    """Cancel a sweep that has not ended, with its jobs and evaluations. Policies and results so far are kept."""
    client.post(f"/x/sweeps/{sweep_id}/cancel", cast_to=object)
    out.print(f"cancelled {sweep_id}")


@api_command(app)
def delete(client: "OpenAI", sweep_id: SweepId) -> None:
    """Delete a sweep that has ended. The sweep's jobs, models and evaluations stay."""
    client.delete(f"/x/sweeps/{sweep_id}", cast_to=object)
    out.print(f"deleted {sweep_id}")


@api_command(app)
def frontier(
    client: "OpenAI",
    sweep_id: SweepId,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Picture file to draw reward against KL divergence into; the name must end with .svg, .png or .pdf. "
            "Default: print a table."
        ),
    ] = None,
    kl: Annotated[
        str | None,
        typer.Option(
            help="Name of the sweep's evaluation whose KL divergence is taken. Its kind must be `drift`. Default: the "
            "sweep's first evaluation of this kind."
        ),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            help="Name of the sweep's evaluation whose result is taken as the reward. Its kind must be `score` or "
            "`compare`. Default: the sweep's first evaluation of these kinds."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the policies of a sweep: the reward of each against its KL divergence from the reference model, with 95%
    intervals.
    """
    params = {name: value for name, value in (("kl", kl), ("reward", reward)) if value is not None}
    found: Any = client.get(f"/x/sweeps/{sweep_id}/frontier", cast_to=object, options={"params": params})
    if output is not None:
        frontier_picture.draw(found, output)
        err.print(f"drawn into {output}")
    elif as_json:
        out.print_json(data=found)
    else:
        names = list(dict.fromkeys(path for point in found["data"] for path in point["parameters"]))
        columns = ["trial", *_names(names), found["kl"], "95% interval", found["reward"], "95% interval", "frontier"]
        print_rows(columns, [_point(point, names) for point in found["data"]])


def _point(point: Item, names: Sequence[str]) -> list[str]:
    estimates = [f"{point[axis]['value']:.4g}" for axis in ("kl", "reward")]
    ranges = [f"{point[axis]['low']:.4g} to {point[axis]['high']:.4g}" for axis in ("kl", "reward")]
    cells = [estimates[0], ranges[0], estimates[1], ranges[1], "yes" if point["on_frontier"] else ""]
    return [point["trial"], *(_text(point["parameters"].get(name, "")) for name in names), *cells]


def _trials(client: "OpenAI", sweep_id: str) -> list[Item]:
    """Returns all trials (jobs) of the sweep, in the order in which they began."""
    found: list[Item] = []
    params: dict[str, object] = {"limit": 100}
    while len(found) <= MOST_TRIALS:
        page: Any = client.get(f"/x/sweeps/{sweep_id}/trials", cast_to=object, options={"params": params})
        found += page["data"]
        if not page["has_more"]:
            break
        params["after"] = page["last_id"]
    return found


def _print_sweep(client: "OpenAI", sweep: Item) -> None:
    """Prints the sweep's state, and a table of its trials (jobs). The best trial comes first; trials without a value of
    the sweep's metric come last.
    """
    trials, metric = _trials(client, sweep["id"]), sweep["request"].get("metric")
    if metric:
        sign = 1 if metric["goal"] == "minimize" else -1
        trials.sort(key=lambda trial: (trial["value"] is None, sign * (trial["value"] or 0), int(trial["id"])))
    err.print(f"{sweep['id']}: {safe(_state(sweep))}")
    paths = list(sweep["request"]["parameters"])
    columns = ["trial", *_names(paths), metric["name"] if metric else "value", "state", "job", "policy"]
    print_rows(columns, [_row(trial, paths) for trial in trials])


def _row(trial: Item, paths: Sequence[str]) -> list[str]:
    value = "" if trial["value"] is None else f"{trial['value']:.6g}"
    state = f"{trial['status']}: {trial['error']['message']}" if trial["error"] else trial["status"]
    values = [_text(trial["parameters"][path]) for path in paths]
    return [trial["id"], *values, value, state, trial["job_id"] or "", trial["model"] or ""]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _names(paths: Sequence[str]) -> list[str]:
    """Returns a heading for each path of a parameter: the last part of the path, such as `beta`. If two paths have the
    same last part, their headings are the whole paths.
    """
    last = [path.rpartition(".")[2] for path in paths]
    return [path if last.count(name) > 1 else name for path, name in zip(paths, last, strict=True)]
