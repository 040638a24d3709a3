"""OpenAI's client, which checks each answer strictly against the type that the client itself reads it as.

As a program, `strict.py PROGRAM …` runs another with this client in the place of OpenAI's.
"""

import runpy
import sys
from typing import Any

import openai
from pydantic import BaseModel, TypeAdapter, ValidationError


def _is_known(error: Any) -> bool:
    """`paused` is what OpenAI's own example answers, and not in its list of statuses; it has three of our methods."""
    *_, name = where = error["loc"]
    return (name == "status" and error["input"] == "paused") or (
        where[-2:] == ("method", "type") and error["type"] == "literal_error" and error["input"].isidentifier()
    )


def check(cast_to: Any, response: Any) -> None:
    """Numbers are not texts, literals are held, nothing that is required lacks. More keys are allowed."""
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
