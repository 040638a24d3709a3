"""The body of a request for a job: from a file, from options, and from KEY=VALUE, the later over the earlier."""

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_core.data.survey import survey
from dpo_core.methods import COMMON, METHODS, described
from services.cli import yaml_values
from services.cli.client import err, fail, send_file

if TYPE_CHECKING:
    from openai import OpenAI

Body = dict[str, Any]
Assignment = tuple[tuple[str, ...], Any]
"""Where a value belongs in the body, and the value; None takes out what is there."""

FILES = ("training_file", "validation_file")
READING = ("columns", "invalid_rows", "max_invalid_share")  # of x_raydpo, said with a file when it is uploaded
FIRST_ROWS = 100


def read_config(path: Path) -> Body:
    """The body in a YAML, TOML or JSON file. Paths of local files in it are relative to its folder."""
    readers: dict[str, Callable[[str], Any]] = {
        ".yaml": yaml_values.parse,
        ".yml": yaml_values.parse,
        ".toml": tomllib.loads,
        ".json": _json,
    }
    if (read := readers.get(path.suffix.lower())) is None:
        fail(f"--config {path}: name a file that ends with {', '.join(readers)}.")
    try:
        body = read(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # which all of them raise, and a text that is not UTF-8
        fail(f"{path} cannot be read: {error}.")
    if not isinstance(body, dict):
        fail(f"{path} holds no fields; write the body of POST /fine_tuning/jobs, such as `model: qwen`.")
    for field in FILES:
        named = body.get(field)
        if isinstance(named, str) and (path.parent / named).is_file():
            body[field] = str(path.parent / named)
    return body


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_without_repeats)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"'{repeated[0]}' stands twice")
    return dict(pairs)


def assignment(text: str) -> Assignment:
    """`x_raydpo.max_length=512`. `method.dpo.beta` is short for `method.dpo.hyperparameters.beta`."""
    key, found, value = text.partition("=")
    path = tuple(key.split("."))
    if not found or not all(path):
        fail(f"--set {text}: write KEY=VALUE, such as x_raydpo.max_length=512.")
    if path[0] == "metadata" and len(path) > 1:  # whose keys may have dots, and whose values are texts
        return ("metadata", key.partition(".")[2]), None if value == "null" else value
    if path[0] == "method" and len(path) == 3 and path[2] != "hyperparameters":
        path = (*path[:2], "hyperparameters", path[2])
    try:
        return path, yaml_values.parse(value)
    except ValueError as error:
        fail(f"--set {text}: {error}; put a text in quotes.")


def compose(
    base: Body,
    *,
    method: str | None,
    default: str | None,
    hyperparameters: Mapping[str, Any],
    others: Sequence[Assignment],
    sets: Sequence[Assignment],
) -> Body:
    """`base` with what the options say, and over both what --set says. `default`: the method where none is named."""
    for _, whole in [each for each in sets if each[0] == ("method",)]:
        base = base | {"method": whole}
    sets = [each for each in sets if each[0] != ("method",)]
    body = _with_method(base, method, default, sets)
    told = _part(body, "method")
    place = ("method", str(told["type"]), "hyperparameters") if "type" in told else ("hyperparameters",)
    changes = [*(((*place, name), value) for name, value in hyperparameters.items()), *others, *sets]
    if any(path == ("training_file",) for path, _ in changes):
        _assign(body, ("x_raydpo", "dataset"), None)  # which names the file of `base`
    for path, value in changes:
        _assign(body, path, value)
    named = body.get("training_file")
    if isinstance(named, str) and "://" in named and "dataset" not in _part(body, "x_raydpo"):
        _assign(body, ("x_raydpo", "dataset"), named)
    try:
        json.dumps(body, allow_nan=False)
    except (TypeError, ValueError) as error:
        fail(f"the request cannot be written as JSON: {error}. Put dates in quotes; numbers must be finite.")
    return body


def _with_method(base: Body, method: str | None, default: str | None, sets: Sequence[Assignment]) -> Body:
    """The body with the method that is named last. If that is another one, it keeps what all methods have."""
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
        err.print(f"The method is {kind}; of {old} before, this is left out: {', '.join(lost)}.")
    return deepcopy(base) | {"method": {"type": kind, str(kind): {"hyperparameters": kept}}}


def _part(body: Body, name: str) -> Body:
    part = body.get(name)
    return part if isinstance(part, dict) else {}


def _assign(body: Body, path: tuple[str, ...], value: Any) -> None:
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
    """The files that are to be uploaded, by their fields. Fails if one is not there."""
    found = {}
    for field in FILES:
        match body.get(field):
            case str(named) if "://" not in named and Path(named).is_file():
                found[field] = Path(named)
            case str(named) if "://" not in named and not named.startswith("file-"):
                fail(f"{named} is neither a local file nor the id of an uploaded one, nor a URI.")
    return found


def validate(client: "OpenAI", body: Body, local: Mapping[str, Path]) -> Body:
    """The job as it would be. Nothing is sent of its local files, but they are looked into."""
    names = {field: str(path) if path.is_absolute() else f"./{path}" for field, path in local.items()}
    job: Any = client.post("/x/jobs/validate", body=body | names, cast_to=object)
    for path in local.values():
        _check_first_rows(path, _reading(body), job["method"]["type"])
    return dict(job)


def _check_first_rows(path: Path, how: Body, kind: str) -> None:
    """Fails if the service would refuse the file for one of its first rows."""
    from services.containers import json_lines

    with path.open("rb") as file:
        found = survey(islice(json_lines(file), FIRST_ROWS), columns=how.get("columns"))
    if found.refusal and how.get("invalid_rows") != "drop":
        fail(f"{path}: {found.refusal}")
    method = described(kind) if kind in METHODS else None  # a newer service may have others
    if method and found.kind and found.kind not in method["learns_from"]:
        fail(f"{path} holds {found.kind}; method '{kind}' learns from {' or '.join(method['learns_from'])}.")
    if method and found.num_margins and not method["takes_margins"]:
        fail(f"{path} has margins; method '{kind}' takes none. Remove them, or use dpo.")


def upload(client: "OpenAI", body: Body, local: Mapping[str, Path]) -> Body:
    """The body with the ids of its local files, which are uploaded with what it says of their rows."""
    for field, path in local.items():
        stored = send_file(client, path, _reading(body))
        err.print(f"{path} uploaded as {stored.id}")
        body = body | {field: stored.id}
    if "training_file" in local:
        extension = _part(body, "x_raydpo")
        body = body | {"x_raydpo": {name: value for name, value in extension.items() if name not in READING}}
    return body


def _reading(body: Body) -> Body:
    return {name: value for name, value in _part(body, "x_raydpo").items() if name in READING}
