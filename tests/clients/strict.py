"""Checks each answer that OpenAI's client gets strictly against the type that the client reads it as.

As a program, `strict.py PROGRAM …` runs another program with this client in place of OpenAI's.
"""

import runpy
import sys
from typing import Any

import openai
from pydantic import BaseModel, TypeAdapter, ValidationError


def _is_known(error: Any) -> bool:
    """Whether the error is one of two known deviations.

    OpenAI's own example has the status `paused`, which is missing in its list of statuses. Its list of methods has
    three of ours.
    """
    *_, name = where = error["loc"]
    return (name == "status" and error["input"] == "paused") or (
        where[-2:] == ("method", "type") and error["type"] == "literal_error" and error["input"].isidentifier()
    )


def check(cast_to: Any, response: Any) -> None:
    """Raises an error if the answer does not match the type `cast_to`.

    Numbers may not be texts, literals must be listed, and required keys must be there. More keys are allowed.
    """
    kind = response.headers.get("content-type", "")
    if not (response.is_success and response.is_stream_consumed and kind.startswith("application/json")):
        return
    origin = getattr(cast_to, "__pydantic_generic_metadata__", {}).get("origin") or cast_to
    if not (isinstance(origin, type) and issubclass(origin, BaseModel)):
        return
    try:
        TypeAdapter(cast_to).validate_python(response.json(), strict=True)
    except ValidationError as error:
        wrong = [found for found in error.errors() if not _is_known(found)]
        assert not wrong, f"{response.request.method} {response.request.url} is no {cast_to.__name__}: {wrong}"


class OpenAI(openai.OpenAI):
    def _process_response(self, *, cast_to: Any, response: Any, **rest: Any) -> Any:
        check(cast_to, response)
        return super()._process_response(cast_to=cast_to, response=response, **rest)


class AsyncOpenAI(openai.AsyncOpenAI):
    async def _process_response(self, *, cast_to: Any, response: Any, **rest: Any) -> Any:
        check(cast_to, response)
        return await super()._process_response(cast_to=cast_to, response=response, **rest)


if __name__ == "__main__":
    openai.OpenAI, openai.AsyncOpenAI = OpenAI, AsyncOpenAI  # type: ignore[misc]
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
