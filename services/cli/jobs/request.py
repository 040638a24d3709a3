"""Builds the body of the HTTP request that creates a job, from a config file, command-line options and KEY=VALUE texts.

Options override the config file, and KEY=VALUE texts (values of --set) override both.
"""

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpo_core.data.survey import survey
from dpo_core.methods import COMMON, METHODS, described
from services.cli import yaml_values
from services.cli.client import err, fail, send_file

if TYPE_CHECKING:
    from openai import OpenAI

Body = dict[str, Any]
Assignment = tuple[tuple[str, ...], Any]
"""The path of a field in the request's body, and the field's new value. The value None removes the field."""

OPTIONS = {"training_file": "--file", "validation_file": "--validation-file"}
FILES = tuple(OPTIONS)
READING = ("columns", "invalid_rows", "max_invalid_share")  # fields of x_raydpo that are sent when a file is uploaded
FIRST_ROWS = 100

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help="YAML, TOML or JSON file with the body of POST /fine_tuning/jobs. "
        "The other options override the file's fields. Default: none.",
    ),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Sets a field of the request's body, such as x_raydpo.max_length=512 or "
        "method.simpo.gamma_beta_ratio=0.5. VALUE is YAML; null removes the field. "
        "Repeatable; overrides all other options.",
    ),
]


def read_config(path: Path) -> Body:
    """Reads a YAML, TOML or JSON file, which has the body of POST /fine_tuning/jobs, and returns the body.

    Relative paths of data files in the body are resolved against the folder of the config file. Exits with an error if
    the file cannot be read.
    """
    return all_beside(path, read_fields(path, "POST /fine_tuning/jobs into the file, such as `model: qwen`"))


def read_fields(path: Path, which: str) -> Body:
    """Reads a YAML, TOML or JSON file with the body of a request, and returns the body.

    Exits with an error if the file cannot be read or has no fields. `which` is the end of the error message about
    missing fields, such as "POST /fine_tuning/jobs into the file, such as `model: qwen`".
    """
    readers: dict[str, Callable[[str], Any]] = {
        ".yaml": yaml_values.parse,
        ".yml": yaml_values.parse,
        ".toml": tomllib.loads,
        ".json": _json,
    }
    if (read := readers.get(path.suffix.lower())) is None:
        fail(f"--config {path} has no known format; give a file whose name ends with {', '.join(readers)}.")
    try:
        body = read(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # all readers raise ValueError, and so does text that is not UTF-8
        fail(f"{path} cannot be read: {error}.")
    if not isinstance(body, dict):
        fail(f"{path} holds no fields; write fields of {which}.")
    return body


def beside(path: Path, body: Body, field: str) -> Body:
    """Returns a copy of the body in which the field `field` has the whole path of the data file that it names, if this
    file is in the folder of the config file `path`. Otherwise returns the body unchanged."""
    named = body.get(field)
    if isinstance(named, str) and (path.parent / named).is_file():
        return body | {field: str(path.parent / named)}
    return body


def all_beside(path: Path, body: Body) -> Body:
    """Returns a job's request body with the whole paths of the data files that lie in the folder of the config file
    `path`. Changes nothing else.
    """
    for field in _file_fields(body):
        named = _at(body, field)
        if isinstance(named, str) and (path.parent / named).is_file():
            body = _with(body, field, str(path.parent / named))
    return body


def _file_fields(body: Body) -> list[str]:
    """Returns the paths of the fields of a job's request body that name files: its data, and the prompts of its
    evaluations.
    """
    evaluations = _part(_part(body, "x_raydpo"), "evaluations")
    named = [name for name, each in evaluations.items() if isinstance(each, dict) and "file" in each]
    return [*FILES, *(f"x_raydpo.evaluations.{name}.file" for name in named)]


def _at(body: Body, field: str) -> Any:
    value: Any = body
    for name in field.split("."):
        value = (value or {}).get(name)
    return value


def _with(body: Body, field: str, value: str) -> Body:
    changed = deepcopy(body)
    assign(changed, tuple(field.split(".")), value)
    return changed


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_without_repeats)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"the key '{repeated[0]}' is given twice")
    return dict(pairs)


def assignment(text: str) -> Assignment:
    """Parses KEY=VALUE text, such as `x_raydpo.max_length=512`. Returns the path of the field and its new value.

    The key `method.dpo.beta` is short for `method.dpo.hyperparameters.beta`. Exits with an error if the text has
    another form.
    """
    key, found, value = text.partition("=")
    path = tuple(key.split("."))
    if not found or not all(path):
        fail(f"--set {text}: write KEY=VALUE, such as x_raydpo.max_length=512.")
    if path[0] == "metadata" and len(path) > 1:  # keys of metadata may contain dots, and its values are strings
        return ("metadata", key.partition(".")[2]), None if value == "null" else value
    if path[0] == "method" and len(path) == 3 and path[2] != "hyperparameters":
        path = (*path[:2], "hyperparameters", path[2])
    try:
        return path, yaml_values.parse(value)
    except ValueError as error:
        fail(f"--set {text}: {error}; put a value that is a string in quotes.")


def compose(
    base: Body,
    *,
    method: str | None,
    default: str | None,
    hyperparameters: Mapping[str, Any],
    others: Sequence[Assignment],
    sets: Sequence[Assignment],
) -> Body:
    """Returns a copy of a job's request body `base`, changed by the command's options and then by the values of --set.

    The options are `method`, `hyperparameters` and `others`; `sets` holds the values of --set. The training method is
    `default` if neither `base` nor an option names one.
    """
    for _, whole in [each for each in sets if each[0] == ("method",)]:
        base = base | {"method": whole}
    sets = [each for each in sets if each[0] != ("method",)]
    body = _with_method(base, method, default, sets)
    told = _part(body, "method")
    place = ("method", str(told["type"]), "hyperparameters") if "type" in told else ("hyperparameters",)
    changes = [*(((*place, name), value) for name, value in hyperparameters.items()), *others, *sets]
    if any(path == ("training_file",) for path, _ in changes):
        assign(body, ("x_raydpo", "dataset"), None)  # x_raydpo.dataset repeats the training file of `base`
    for path, value in changes:
        assign(body, path, value)
    named = body.get("training_file")
    if isinstance(named, str) and "://" in named and "dataset" not in _part(body, "x_raydpo"):
        assign(body, ("x_raydpo", "dataset"), named)
    try:
        json.dumps(body, allow_nan=False)
    except (TypeError, ValueError) as error:
        fail(f"the request cannot be written as JSON: {error}. Put dates in quotes; numbers must be finite.")
    return body


def _with_method(base: Body, method: str | None, default: str | None, sets: Sequence[Assignment]) -> Body:
    """Returns a copy of a job's request body `base` that names the training method to use.

    The method is the first one that is given: in `sets`, by `method`, in `base`, by `default`. If the method differs
    from that of `base`, the copy keeps only those hyperparameters that every method has.
    """
    before = _part(base, "method")
    old = before.get("type")
    said = [value for path, value in sets if path == ("method", "type")]
    named = [path[1] for path, _ in sets if path[0] == "method" and len(path) > 2]
    kind = said[-1] if said else method or old or (named[0] if named else default)
    if kind is None or kind == old:
        return deepcopy(base)
    options = _part(_part(before, str(old)), "hyperparameters")
    kept = {name: value for name, value in options.items() if name in COMMON}
    if lost := [str(name) for name in options if name not in kept]:
        err.print(f"The method changes from {old} to {kind}; these options of {old} are dropped: {', '.join(lost)}.")
    return deepcopy(base) | {"method": {"type": kind, str(kind): {"hyperparameters": kept}}}


def _part(body: Body, name: str) -> Body:
    part = body.get(name)
    return part if isinstance(part, dict) else {}


def assign(body: Body, path: tuple[str, ...], value: Any) -> None:
    """Sets the field of the request body at `path` to `value`, and adds the objects on the path that are missing.

    If `value` is None, removes the field. Exits with an error if the path leads through a value that is no object.
    """
    *parents, last = path
    part = body
    for depth, name in enumerate(parents, 1):
        if value is None and part.get(name) is None:
            return
        if part.get(name) is None:
            part[name] = {}
        part = part[name]
        if not isinstance(part, dict):
            above = ".".join(path[:depth])
            fail(f"{'.'.join(path)} cannot be set, because {above} is {part!r:.80}; set {above} as a whole.")
    if value is None:
        part.pop(last, None)
    else:
        part[last] = value


def local_files(body: Body) -> dict[str, Path]:
    """Returns the path of each local data file that must be uploaded, by the field of the request body that names the
    file.

    Exits with an error if a field names neither a local file, nor an uploaded file, nor a URI.
    """
    found = {}
    for field in _file_fields(body):
        match _at(body, field):
            case str(named) if "://" not in named and Path(named).is_file():
                found[field] = Path(named)
            case str(named) if "://" not in named and not named.startswith("file-"):
                fail(f"{named} is neither a local file, nor the id of an uploaded file, nor a URI; correct {field}.")
    return found


def validate(client: "OpenAI", body: Body, local: Mapping[str, Path]) -> Body:
    """Asks the service which job it would create from the request body `body`, and returns this job. Nothing is created
    or uploaded.

    `local` holds the path of each local data file, by the field of the body that names the file. Exits with an error if
    the service would refuse the body or one of the first rows of a local file.
    """
    from openai import NotFoundError

    try:
        job: Any = client.post("/x/jobs/validate", body=_unsent(body, local), cast_to=object)
    except NotFoundError as error:
        if error.code != "file_not_found" or error.param not in OPTIONS:
            raise
        what = f"There is no file {body[error.param]}. It may have been deleted"
        fail(f"{what}; choose another one with {OPTIONS[error.param]}.")
    for path in [path for field, path in local.items() if field in FILES]:
        _check_first_rows(path, _reading(body), job["method"]["type"])
    return dict(job)


def plan_unsent(client: "OpenAI", body: Body, local: Mapping[str, Path]) -> Body | None:
    """Asks the service whether the job of the request body `body` would fit into memory, and returns the plan. Nothing
    is uploaded. Returns None, and prints the reason, if the service cannot plan the memory of the job's model.

    `local` holds the path of each local data file, by the field of the body that names the file.
    """
    from openai import BadRequestError

    try:
        plan: Any = client.post("/x/plans", body=_unsent(body, local), cast_to=object)
    except BadRequestError as error:
        if error.code not in ("model_unreadable", "model_unplannable"):
            raise
        err.print(error.message, markup=False)
        return None
    return dict(plan)


def _unsent(body: Body, local: Mapping[str, Path]) -> Body:
    """Returns the request body with the names of local files in the form that the service expects: an absolute path, or
    a relative one that begins with `./`. `local` holds the path of each file, by the field that names the file.
    """
    for field, path in local.items():
        body = _with(body, field, str(path) if path.is_absolute() else f"./{path}")
    return body


def _check_first_rows(path: Path, how: Body, kind: str) -> None:
    """Reads the first rows of a local data file, and exits with an error if the file cannot be used for a job.

    `how` holds the options for reading the rows, and `kind` is the job's training method. A file cannot be used if the
    service would refuse the rows, or if the method cannot learn from this kind of data.
    """
    from services.containers import json_lines

    with path.open("rb") as file:
        found = survey(islice(json_lines(file), FIRST_ROWS), columns=how.get("columns"))
    if found.refusal and how.get("invalid_rows") != "drop":
        fail(f"{path}: {found.refusal}")
    method = described(kind) if kind in METHODS else None  # a newer service may have methods that are unknown here
    if method and found.kind and found.kind not in method["learns_from"]:
        kinds = " or ".join(method["learns_from"])
        fail(f"{path} holds {found.kind}; method '{kind}' learns from {kinds}. Choose another method or another file.")
    if method and found.num_margins and not method["takes_margins"]:
        fail(f"{path} has margins; method '{kind}' takes none. Remove the margins, or use dpo.")


def upload(client: "OpenAI", body: Body, local: Mapping[str, Path]) -> Body:
    """Uploads the local data files, and returns the request body with the files' ids in place of their paths.

    `local` holds the path of each file, by the field of the body that names the file. The body's options for reading
    rows are sent with each data file.
    """
    for field, path in local.items():
        stored = send_file(client, path, _reading(body) if field in FILES else {})
        err.print(f"{path} uploaded as {stored.id}")
        body = _with(body, field, stored.id)
    if "training_file" in local:
        extension = _part(body, "x_raydpo")
        body = body | {"x_raydpo": {name: value for name, value in extension.items() if name not in READING}}
    return body


def _reading(body: Body) -> Body:
    return {name: value for name, value in _part(body, "x_raydpo").items() if name in READING}
