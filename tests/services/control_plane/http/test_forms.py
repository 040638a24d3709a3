"""Tests multipart bodies with a file, as an HTTP client writes them."""

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from services.control_plane.core.errors import InvalidRequest, TooLarge
from services.control_plane.http.forms import FIELD_BYTES, FIELDS, multipart, read_form
from services.control_plane.http.limits.limits import Limits
from services.control_plane.settings import Settings

NOWHERE = dict.fromkeys(("DATABASE_URL", "storage_url", "advertised_url", "ray_url"), "http://nowhere")
MOST = 1000
FILE = ("rows.jsonl", b"12345")
app = FastAPI()
forms: list[Any] = []


@app.post("/")
async def upload(request: Request) -> None:
    async with read_form(request, "file", most=MOST, remedy="Send less.") as form:
        forms.append((form.source.read(), form.num_bytes, form.filename, form.fields))


async def nobody(token: str) -> None:
    return None


app.add_middleware(Limits, settings=Settings(**NOWHERE, api_key="k"), project_of=nobody)


def read(files: Any, data: Any = None, **more: Any) -> Any:
    """Sends a form. Returns what `read_form` read: the bytes, their number, the file's name and the other fields."""

    async def send() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            await client.post("/", files=files, data=data, **more)

    forms.clear()
    asyncio.run(send())
    return forms[0]


def test_the_file_and_the_fields_are_read_and_brackets_make_dicts() -> None:
    data = {"purpose": "fine-tune", "x_raydpo[columns][prompt]": "q", "x_raydpo[columns][chosen]": "a", "e[at]": "1"}
    fields = {"purpose": "fine-tune", "x_raydpo": {"columns": {"prompt": "q", "chosen": "a"}}, "e": {"at": "1"}}
    assert read({"file": FILE}, data) == (b"12345", 5, "rows.jsonl", fields)


def test_a_file_as_large_as_the_limit_is_read_and_a_larger_one_refused_with_size_limit_and_remedy() -> None:
    assert read({"file": ("f", b"x" * MOST)})[1] == MOST
    with pytest.raises(TooLarge, match=rf"in 'file' has {MOST + 1} bytes; the limit is {MOST}\. Send less\.") as raised:
        read({"file": ("f", b"x" * (MOST + 1))})
    assert raised.value.param == "file"


@pytest.mark.parametrize("files", [{"other": FILE}, {"file": (None, b"a field")}])
def test_a_form_without_the_file_is_refused_by_name(files: Any) -> None:
    with pytest.raises(InvalidRequest, match="Missing required parameter: 'file'") as raised:
        read(files)
    assert raised.value.code == "missing_required_parameter"


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"purpose": ["a", "b"]}, "purpose"),
        ({"a[b]": ["1", "2"]}, "a[b]"),
        ({"a": "1", "a[b]": "2"}, "a[b]"),
        ({"a[b]": "1", "a": "2"}, "a"),
    ],
)
def test_a_field_that_is_given_twice_is_refused_by_name(data: Any, named: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        read({"file": FILE}, data)
    assert raised.value.message == f"The form field '{named}' is given twice; send the field once."
    assert raised.value.param == named


@pytest.mark.parametrize(
    ("files", "data", "more"),
    [
        ([("file", FILE), ("file", FILE)], None, {}),
        ({"file": FILE}, {f"f{number}": "1" for number in range(FIELDS + 1)}, {}),
        ({"file": FILE}, {"purpose": "x" * (FIELD_BYTES + 1)}, {}),
        (None, None, {"content": b"no form", "headers": {"content-type": "multipart/form-data"}}),
    ],
)
def test_a_form_beyond_its_limits_is_refused(files: Any, data: Any, more: Any) -> None:
    with pytest.raises(InvalidRequest, match="is not a multipart form that can be read"):
        read(files, data, **more)


def test_the_openapi_document_requires_the_file_and_the_first_field() -> None:
    content = multipart("file", "purpose", "note")["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert content["required"] == ["file", "purpose"]
    assert content["properties"]["file"] == {"type": "string", "format": "binary"}
    assert content["properties"].keys() == {"file", "purpose", "note"}
    assert multipart("data")["requestBody"]["content"]["multipart/form-data"]["schema"]["required"] == ["data"]
