"""The `raydpo data` commands: check training files on this machine, without a service."""

import json
import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from dpo_core.config import TrainConfig, Truncation
from dpo_core.data.survey import FeedbackReport, survey
from dpo_core.options import InvalidOption
from services.cli.client import err, fail
from services.cli.files.findings import print_preview, print_survey, print_tokens
from services.cli.reading import Columns, MaxInvalidShare, roles_of

if TYPE_CHECKING:
    from services.training.check_program import Check

app = typer.Typer(no_args_is_help=True, help="Check training files on this machine.")


@app.callback()
def data() -> None:
    """Check training files on this machine, without a service."""


@app.command()
def check(
    file: Annotated[
        Path,
        typer.Argument(
            help="Training file to check, with rows in JSON Lines (plain, gzip or zstd), Parquet or Arrow.", exists=True
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|HUB_ID",
            help="Local folder or Hugging Face hub id of a model whose tokenizer encodes the rows. "
            "Default: check the rows without a tokenizer.",
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Maximum number of tokens of a prompt and one completion together. Default: 2048."),
    ] = None,
    truncation: Annotated[
        Truncation | None,
        typer.Option(
            help="What to do with rows longer than --max-length: drop them, cut the end of their completions "
            "(keep_start) or the start of their prompt (keep_end). Default: drop."
        ),
    ] = None,
    columns: Columns = None,
    max_invalid_share: MaxInvalidShare = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, instead of as text.")] = False,
) -> None:
    """Report what a training file holds and which of its rows are wrong, without a service.

    The command exits with status 1 if the service would refuse the file.
    """
    from services.containers import json_lines

    given = {"max_length": max_length, "truncation": truncation}
    config = _config({name: value for name, value in given.items() if value is not None}, model)
    roles = roles_of(columns)
    if file.is_dir():
        fail(f"{file} is a folder; give the path of a file.")
    with err.status(f"reading {file.name}"), file.open("rb") as lines:
        found = survey(json_lines(lines), columns=roles)
    is_refused = found.refusal_beyond(max_invalid_share or 0.0) is not None
    checked = None
    if model and not is_refused:
        with err.status(f"encoding {file.name}"):
            checked = _encode(file, model, config, max_invalid_share, roles)
    if as_json:
        report = {"survey": asdict(found)} | (checked.model_dump(mode="json") if checked else {})
        typer.echo(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        _print(found, checked, is_refused=is_refused)
    if is_refused:
        raise typer.Exit(1)
    if checked and not checked.tokens.num_kept:
        _fail_for_want_of_rows(found, checked)


def _fail_for_want_of_rows(found: FeedbackReport, checked: "Check") -> NoReturn:
    from services.training.data.file_report import left_out

    remedy = "raise --max-length, choose another --truncation, or shorten the rows"
    reasons = left_out(checked.tokens, found.kind or "groups", checked.tokens.limit, remedy)
    fail(" ".join(["no row is left to train on.", *reasons]))


def _config(given: dict[str, object], model: str | None) -> TrainConfig:
    if given and model is None:
        fail(f"--{next(iter(given)).replace('_', '-')} counts tokens, and needs a model's tokenizer; add --model.")
    try:
        return TrainConfig(**given)  # type: ignore[arg-type]
    except InvalidOption as error:
        fail(str(error))


def _encode(
    file: Path, model: str, config: TrainConfig, max_invalid_share: float | None, columns: dict[str, str]
) -> "Check":
    """Encodes the file's rows with the model's tokenizer, as training would, but in this process. Returns a report on
    the rows.

    `model` is a local folder or the model's id on the Hugging Face hub. Exits with an error if the file or the model
    cannot be used.
    """
    if missing := [name for name in ("torch", "transformers") if find_spec(name) is None]:
        fail(f"--model needs {' and '.join(missing)}: pip install 'raydpo[cluster]', or leave --model out.")
    from services.contract import InvalidRows, Recipe
    from services.training.check_program import check, in_turn
    from services.training.reports.reporting import JobFailed

    recipe = Recipe(
        training_uri=file.resolve().as_uri(),
        model_source=_source(model),
        max_length=config.max_length,
        truncation=config.truncation,
        invalid_rows=InvalidRows(how="drop", max_share=max_invalid_share) if max_invalid_share else InvalidRows(),
        columns=columns,
    )
    try:
        with tempfile.TemporaryDirectory(prefix="raydpo-") as folder:
            return check(recipe, folder, in_turn)
    except JobFailed as failure:
        fail(failure.report.message)


def _source(model: str) -> str:
    folder = Path(model).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    if model.startswith((".", "/", "~")):
        fail(f"{model} is not a folder; set --model to the folder of a Hugging Face model, or to a hub id.")
    return model


def _print(found: FeedbackReport, checked: "Check | None", *, is_refused: bool) -> None:
    print_survey(found, is_refused=is_refused)
    if checked:
        print_tokens(checked.tokens)
        print_preview(checked.preview)
