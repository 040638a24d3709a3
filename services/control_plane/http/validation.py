"""Validates values in request bodies, and turns errors of pydantic into errors of the API.

Each error names the field and the mistake. If only certain values or names are allowed, the error lists them.
"""

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar

from pydantic import (
    StringConstraints,
    TypeAdapter,
    ValidationError,
)

from dpo_core.options import InvalidOption
from services.control_plane.core.errors import ApiError, InvalidRequest

Text = Annotated[str, StringConstraints(min_length=1)]


Parsed = TypeVar("Parsed")


@functools.cache  # building an adapter takes milliseconds
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def parse(kind: type[Parsed], value: Any, where: str, paths: Mapping[str, str] | None = None) -> Parsed:
    """Returns `value` as the type `kind`, checked by pydantic. Raises InvalidRequest, which names the invalid field.

    Error messages name a field by its path in the request's body. The path normally begins with `where`, the path of
    `value`. Fields of `value` that stand elsewhere in the body are in `paths`, which maps their names to their whole
    paths.
    """
    try:
        parsed: Parsed = _adapter(kind).validate_python(value)  # type: ignore[arg-type]  # a type is hashable
    except ValidationError as error:
        first = error.errors()[0]
        raise refused(first, first["loc"], where, paths, kind) from None
    return parsed


def refused(
    error: Mapping[str, Any],
    location: Sequence[str | int],
    where: str = "",
    paths: Mapping[str, str] | None = None,
    kind: Any = None,
) -> InvalidRequest:
    """Turns an error of pydantic into an InvalidRequest with the dotted path of the field, a code, and the reason.

    `location` is the field's path within the validated value, whose type is `kind`. The path in the request's body
    normally begins with `where`, the path of the value. Fields of the value that stand elsewhere in the body are in
    `paths`, which maps their names to their whole paths.
    """
    cause = error.get("ctx", {}).get("error")
    path = [cause.field] if isinstance(cause, InvalidOption) else [str(part) for part in location]
    param = (paths or {}).get(path[-1]) if path else None
    param = param or ".".join([*([where] if where else []), *path])
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return _unknown(param, _names(kind) if len(path) == 1 else set())
    if error["type"] == "missing":
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    reason = str(cause) if cause else f"{error['msg']}, but it is {error['input']!r:.80}."
    return InvalidRequest(f"Invalid value for '{param}': {reason}", param=param)


def refuse_unknown(given: Mapping[str, Any], known: set[str], where: str) -> None:
    """Raises InvalidRequest for the first key of the JSON object `given` that is not in `known`.

    `where` is the path of this object in the request's body.
    """
    for name in given:
        if name not in known:
            raise _unknown(f"{where}.{name}", known)


def _unknown(param: str, known: set[str]) -> InvalidRequest:
    """Returns the error for a field of a request that is not one of the fields `known`. The message suggests the known
    name that resembles it most.

    `param` is the dotted path of the field.
    """
    where, _, name = param.rpartition(".")
    guess = meant(name, known)
    listed = f" {where or 'The request'} can have: {', '.join(sorted(known))}." if known else ""
    return InvalidRequest(f"Unknown parameter: '{param}'.{guess}{listed}", param=param, code="unknown_parameter")


def meant(name: str, known: Collection[str]) -> str:
    """Returns the sentence " Did you mean …?" with the known name that resembles `name` most.

    Returns '' if no known name resembles it.
    """
    close = get_close_matches(name, known, n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def _names(kind: Any) -> set[str]:
    """Returns the names of the fields of a pydantic model or a dataclass. Returns an empty set for any other type."""
    fields: Mapping[str, Any] = getattr(kind, "model_fields", None) or getattr(kind, "__dataclass_fields__", {})
    return set(fields)


@contextmanager
def within(where: str, note: str = "") -> Iterator[None]:
    """Corrects the field that an error names, if an ApiError is raised in the `with` block. The block checks one part
    of a request's body, and its errors name a field by the path within this part.

    `where` is the path of the part, such as `method.dpo`. It is put in front of the field's path. `note` is added to
    the error's message.
    """
    try:
        yield
    except ApiError as error:
        if error.param is None:
            error.param = where
        elif not error.param.startswith(f"{where}."):
            error.param = f"{where}.{error.param}"
        error.message += note
        error.args = (error.message,)
        raise
