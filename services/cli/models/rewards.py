"""The `raydpo rewards` command: score the rows of a file with a policy and its reference, or with a reward model."""

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer
from rich.status import Status

from services.cli.client import api_command, err, fail, message_of, safe
from services.cli.models.reward_summary import Summary
from services.cli.reading import Columns, roles_of

if TYPE_CHECKING:
    from openai import APIStatusError, OpenAI

    from dpo_core.data.groups import Group

ROWS_AT_A_TIME, BYTES_AT_A_TIME = 64, 2**20  # most of one request; a larger row goes alone
WAIT_SECONDS = 1800.0  # how long models may take to load before the command gives up
PLAIN_SECONDS = 10.0
NAMES = ("model", "reference", "beta")  # fields of a request that each line of results repeats


def register(app: typer.Typer) -> None:
    @api_command(app)
    def rewards(
        client: "OpenAI",
        file: Annotated[
            str,
            typer.Argument(
                help="Rows to score: a local file in JSON Lines (plain, gzip or zstd), Parquet or Arrow, or the id of "
                "an uploaded file. The rows have a format of training files, the format of RewardBench 2, or the "
                "fields `prompt` and `completions`."
            ),
        ],
        model: Annotated[str, typer.Option(help="Name of the policy or the reward model that scores the rows.")],
        reference: Annotated[
            str | None,
            typer.Option(
                help="Name of the reference model with which a policy is compared to compute its rewards. Default: the "
                "reference model of the job that trained the policy."
            ),
        ] = None,
        beta: Annotated[
            float | None,
            typer.Option(
                help="Factor by which log-ratios are multiplied to give rewards. Default: the hyperparameter beta of "
                "the job that trained the policy."
            ),
        ] = None,
        out: Annotated[
            Path | None,
            typer.Option(
                help="File to write the rewards to, one JSON object per line. If the file already holds rewards, the "
                "command continues after the last one. Default: standard output."
            ),
        ] = None,
        columns: Columns = None,
    ) -> None:
        """Score the rows of a file with a policy and its reference, or with a reward model.

        If the file says which completions are better, the command ends with the accuracy and the mean margin of the
        rewards, also for each value of the column `subset`.
        """
        given = dict(zip(NAMES, (model, reference, beta), strict=True))
        asked = {name: value for name, value in given.items() if value is not None}
        roles, found = roles_of(columns), Summary()
        with _local(client, file) as path, path.open("rb") as rows, _opened(out) as results:
            last = _resume(results, asked, found) if out else (0, 0)
            tasks = (task for task in _tasks(rows, roles) if (task.line, task.number) > last)
            for result in _scored(client, asked, tasks):
                results.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")
                results.flush()
                found.add(result)
        for line in found.lines():
            err.print(safe(line))


# --- what is read and written -------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A group (a prompt and its completions) to score, and its position in the file.

    The position is the line, and the group's number, from 1, among the groups of this line.
    """

    line: int
    number: int
    group: "Group"
    ratings: Sequence[float] | None  # higher is better; None: the file does not say which completion is better
    subset: str | None

    def row(self) -> dict[str, Any]:
        """Returns the group (a prompt and its completions) as one of the rows in the body of a request to POST
        /x/rewards."""
        extras = {"tools": self.group.tools, "chat_template_kwargs": self.group.template_arguments}
        row = {"prompt": self.group.prompt, "completions": self.group.completions}
        return row | {name: value for name, value in extras.items() if value}


def _tasks(rows: BinaryIO, columns: Mapping[str, str]) -> Iterator[Task]:
    """Reads the rows of a file, and yields each group (a prompt and its completions) as a task to score.

    Exits with an error at the first row that cannot be read.
    """
    from dpo_core.data.feedback import read_records
    from dpo_core.data.jsonl import InvalidRow
    from dpo_core.data.scored_formats import SCORED_FORMATS
    from services.containers import json_lines

    try:
        for record in read_records(json_lines(rows), columns=columns, formats=SCORED_FORMATS):
            if record.problem:
                raise record.problem
            is_pair = record.format is not None and record.format.kind == "pairs"
            for number, group in enumerate(record.groups, 1):
                ratings = group.ratings or ((1.0, 0.0) if is_pair else None)
                yield Task(record.line, number, group, ratings, record.subset)
    except InvalidRow as error:
        fail(str(error))


@contextmanager
def _local(client: "OpenAI", file: str) -> Iterator[Path]:
    """Yields a local path with the content of `file`, which is a local path or the id of a file of the service.

    A file of the service is downloaded, and the copy is deleted at the end of the `with` block.
    """
    if Path(file).is_file() or not file.startswith("file-"):
        yield Path(file)
        return
    with tempfile.NamedTemporaryFile(prefix="raydpo-") as local:
        with client.files.with_streaming_response.content(file) as response:
            for chunk in response.iter_bytes():
                local.write(chunk)
        local.flush()
        yield Path(local.name)


@contextmanager
def _opened(out: Path | None) -> Iterator[BinaryIO]:
    if out is None:
        yield typer.get_binary_stream("stdout")
        return
    out.touch()
    with out.open("r+b") as results:
        yield results


def _resume(results: BinaryIO, asked: Mapping[str, Any], found: Summary) -> tuple[int, int]:
    """Reads the results that an earlier run of the command wrote to the file `results`, and adds them to `found`.

    Returns the position (line, number) of the last result, or (0, 0) if there is none. Removes an incomplete last line.
    Exits with an error if the results come from another model, reference model or beta than those in `asked`.
    """
    last, end = (0, 0), 0
    for line in results:
        if not line.endswith(b"\n"):
            break
        result = json.loads(line)
        for name, value in asked.items():
            if result[name] != value:
                fail(
                    f"the file {results.name} already has rewards with the {name} {result[name]}, not {value}; choose "
                    "another file with --out."
                )
        found.add(result)
        last, end = (result["line"], result["group"]), results.tell()
    results.seek(end)
    results.truncate()
    if end:
        err.print(f"{results.name} has the rewards up to line {last[0]}; the command continues with the next one")
    return last


# --- what is asked ------------------------------------------------------------------------------


class _Voice:
    """Shows the progress of `raydpo rewards`.

    On a terminal, the progress is one line that changes; in a pipe, it is a new line every PLAIN_SECONDS.
    """

    def __init__(self, status: Status) -> None:
        self._status = status
        self._said_at = time.monotonic()

    def say(self, text: str) -> None:
        self._status.update(safe(text))
        if not err.is_terminal and time.monotonic() - self._said_at > PLAIN_SECONDS:
            self._said_at = time.monotonic()
            err.print(safe(text))


def _scored(client: "OpenAI", asked: Mapping[str, Any], tasks: Iterator[Task]) -> Iterator[dict[str, Any]]:
    """Sends the tasks (prompts with completions to score) to the service, several in each request, and yields their
    scores in order.

    `asked` holds the request's other fields, such as the model. Shows the progress meanwhile.
    """
    began, count = time.monotonic(), 0
    with err.status("reading") as status:
        voice = _Voice(status)
        for chunk in _chunks(tasks):
            yield from _ask(client, asked, chunk, voice)
            count += len(chunk)
            speed = count / (time.monotonic() - began)
            voice.say(f"{count} rows scored, up to line {chunk[-1].line}; {speed:.1f} a second")


def _chunks(tasks: Iterator[Task]) -> Iterator[list[Task]]:
    """Splits tasks (prompts with completions to score) into lists, each of which fits into one request, and yields the
    lists.
    """
    chunk: list[Task] = []
    num_bytes = 0
    for task in tasks:
        size = len(json.dumps(task.row()))
        if chunk and (len(chunk) == ROWS_AT_A_TIME or num_bytes + size > BYTES_AT_A_TIME):
            yield chunk
            chunk, num_bytes = [], 0
        chunk.append(task)
        num_bytes += size
    if chunk:
        yield chunk


def _ask(client: "OpenAI", asked: Mapping[str, Any], chunk: list[Task], voice: _Voice) -> list[dict[str, Any]]:
    """Sends one request for the rewards of the tasks in `chunk`, and returns their results. `asked` holds the request's
    other fields, such as the model.

    If the service answers that the request is too large, sends half of the tasks and then the other half. If the
    service asks for a later try, for example because a model is loading, says this through `voice`, waits and sends the
    request again. Exits after any other error.
    """
    from openai import APIStatusError

    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            body = {**asked, "rows": [task.row() for task in chunk]}
            answer: Any = client.with_options(max_retries=0).post("/x/rewards", body=body, cast_to=object)
            return [_result(answer, task, each) for task, each in zip(chunk, answer["data"], strict=True)]
        except APIStatusError as error:
            if error.status_code == 413 and len(chunk) > 1:
                half = len(chunk) // 2
                return _ask(client, asked, chunk[:half], voice) + _ask(client, asked, chunk[half:], voice)
            if error.status_code not in (429, 503) or time.monotonic() > deadline:
                fail(_at_line(error, chunk))
            voice.say(message_of(error))
            time.sleep(float(error.response.headers.get("retry-after") or 1))


def _result(answer: Mapping[str, Any], task: Task, each: Mapping[str, Any]) -> dict[str, Any]:
    place = {"line": task.line, "group": task.number, "subset": task.subset, "ratings": task.ratings}
    compared = {name: answer[name] for name in NAMES}
    return {**place, **compared, "winner": each["winner"], "completions": each["completions"]}


def _at_line(error: "APIStatusError", chunk: Sequence[Task]) -> str:
    """Returns the message of an error with which the API answered the request for the tasks in `chunk`. The message
    names a row by its line in the file, not by its index in the request."""
    message, rows = message_of(error), (error.param or "").split(".")
    if len(rows) < 2 or rows[0] != "rows":
        return message
    row, line = f"rows.{rows[1]}", f"Line {chunk[int(rows[1])].line}"
    return message.replace(f"{row}.", f"{line}, ", 1).replace(row, line, 1)
