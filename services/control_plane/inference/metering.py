"""Counts the tokens of answers while the answers pass through. The service asks the model's server for the count of a
stream, and removes the count from the stream unless the client also asked for it."""

import re
from collections.abc import Callable
from typing import Any

from pydantic_core import from_json

NO_CHOICES = re.compile(rb'"choices":\s*\[\]')  # in the event with the count; JSON escapes quotes in texts
EVENT_END = b"\n\n"
ASKED = b',"stream_options":{"include_usage":true}}'

Note = Callable[[int, int, float], None]  # takes tokens of the prompt and of the completion, and accelerator seconds


def asks_for_usage(options: Any) -> bool:
    """Whether the client's `stream_options` ask for the count of tokens."""
    return isinstance(options, dict) and bool(options.get("include_usage"))


def asking_for_usage(body: bytes) -> bytes:
    """Returns the JSON object `body` with an added field `stream_options` that asks for the count of tokens.

    All other bytes are unchanged. If the body already has the field `stream_options`, the added field at the end
    overrides it. A body in UTF-16 or UTF-32, which is JSON as well, stays as it is.
    """
    if b"\0" in body:
        return body
    return body.rstrip()[:-1] + ASKED


class Meter:
    """Counts the tokens of one answer, and records the count once, when the answer ends."""

    def __init__(self, note: Note, *, shows_usage: bool) -> None:
        self._note, self._shows_usage = note, shows_usage
        self.num_gpus = 0.0  # of the model's engine
        self._counted: tuple[int, int] | None = None
        self._num_events = 0

    def whole(self, body: bytes) -> None:
        """Counts the tokens of an answer that is not a stream."""
        self._read(body)

    def lines(self, lines: bytes) -> bytes:
        """Counts the tokens in lines of a stream, and returns the lines to send to the client."""
        self._num_events += lines.count(EVENT_END)
        if self._counted or not NO_CHOICES.search(lines):
            return lines
        kept = [event for event in lines.split(EVENT_END) if not (self._is_usage(event) and not self._shows_usage)]
        return EVENT_END.join(kept)

    def end(self, seconds: float) -> None:
        """Records the answer's tokens, and the engine seconds that the answer used.

        If the client left a stream before its end, each event so far counts as one token of the completion.
        """
        prompt, completion = self._counted or (0, self._num_events)
        if prompt or completion:
            self._note(prompt, completion, seconds * self.num_gpus)

    def _is_usage(self, event: bytes) -> bool:
        return bool(NO_CHOICES.search(event)) and self._read(event.partition(b"data:")[2])

    def _read(self, text: bytes) -> bool:
        """Reads the count of tokens from a JSON object, and returns whether the object has one."""
        try:
            usage = from_json(text)["usage"]
            self._counted = int(usage["prompt_tokens"]), int(usage.get("completion_tokens") or 0)
        except (ValueError, LookupError, TypeError):
            return False
        return True
