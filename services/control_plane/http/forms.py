"""Reads multipart request bodies that hold a file. Writes the file to disk, within limits on size, after the API key
was checked.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from services.control_plane.core.errors import InvalidRequest, TooLarge
from services.control_plane.http.limits.limits import Body

FIELDS, FIELD_BYTES = 16, 4096  # the most fields beside the file, and the most bytes of each field
OVERHEAD_BYTES = 2**17  # the most bytes of boundaries, headers and fields


@dataclass(frozen=True)
class Form:
    """A multipart body: its file, and its text fields.

    The value of a text field named `a[b]` is `fields["a"]["b"]`.
    """

    source: BinaryIO
    num_bytes: int
    filename: str
    fields: dict[str, Any]


@asynccontextmanager
async def read_form(request: Request, part: str, *, most: int, remedy: str) -> AsyncIterator[Form]:
    """Reads the multipart body of the request, in which the part named `part` is a file of at most `most` bytes.

    The file lies on disk until the end of the `with` block. Raises InvalidRequest if the body is not a multipart form
    with such a part, or gives a field twice. Raises TooLarge, whose message ends with the text `remedy`, if the file is
    too large.
    """
    body: Body = request.state.body
    body.spool(most + OVERHEAD_BYTES, remedy)
    try:
        form = await request.form(max_files=1, max_fields=FIELDS, max_part_size=FIELD_BYTES)
    except HTTPException as error:
        raise InvalidRequest(
            f"The body of the request is not a multipart form that can be read: {error.detail}"
        ) from None
    except ClientDisconnect:
        raise InvalidRequest(
            "The client closed the connection before the whole body had arrived; send the request again."
        ) from None
    try:
        items = form.multi_items()
        file = next((value for name, value in items if name == part and isinstance(value, UploadFile)), None)
        if file is None:
            message = (
                f"Missing required parameter: '{part}'. Send the file as a part of a multipart form, with a file name."
            )
            raise InvalidRequest(message, param=part, code="missing_required_parameter")
        num_bytes = file.size or 0
        if num_bytes > most:
            raise TooLarge(f"The file in '{part}' has {num_bytes} bytes; the limit is {most}. {remedy}", param=part)
        fields = _nested([(name, value) for name, value in items if value is not file])
        yield Form(file.file, num_bytes, file.filename or "", fields)
    finally:
        await form.close()
        body.give_back()


def _nested(items: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in items:
        *outer, last = name.removesuffix("]").replace("][", "[").split("[")
        place: Any = fields
        for key in outer:
            place = place.setdefault(key, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict) or last in place:
            raise InvalidRequest(f"The form field '{name:.80}' is given twice; send the field once.", param=name[:80])
        place[last] = value
    return fields


def multipart(part: str, *fields: str) -> dict[str, Any]:
    """Returns the part of the OpenAPI document that describes a multipart request body.

    The body has a file named `part` and the text fields `fields`. The file and the first text field are required.
    """
    properties = {part: {"type": "string", "format": "binary"}} | {name: {"type": "string"} for name in fields}
    schema = {"type": "object", "properties": properties, "required": [part, *fields[:1]]}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
