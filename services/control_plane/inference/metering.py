"""Counts the tokens of answers while the answers pass through to the client.

The service asks vLLM to add the count of tokens to each stream. The service removes the count again, unless the client
has asked for it.
"""

import re
from collections.abc import Callable
from typing import Any

from pydantic_core import from_json

NO_CHOICES = re.compile(rb'"choices":\s*\[\]')  # only in the event with the count: JSON escapes quotes in texts
ASKED = b',"stream_options":{"include_usage":true}}'

Note = Callable[[int, int, float], None]  # takes tokens of the prompt and of the completion, and accelerator seconds


def asks_for_usage(options: Any) -> bool:
    """Whether a client's request asks for the count of tokens. `options` is the value of the request's field
    `stream_options`.
    """
    return isinstance(options, dict) and bool(options.get("include_usage"))


def asking_for_usage(body: bytes) -> bytes:
    """Adds a field `stream_options`, which asks for the count of tokens, at the end of the JSON object `body`, and
    returns the result.

    All other bytes are unchanged. If the body already has the field `stream_options`, the added field overrides it. A
    body in UTF-16 or UTF-32, which is JSON as well, is returned unchanged.
    """
    if b"\0" in body:
        return body
    return body.rstrip()[:-1] + ASKED


class Meter:
    """Counts the tokens of one answer. When the answer ends, calls `note` once with the numbers of tokens of the prompt
    and the completion, and the accelerator seconds.

    `shows_usage` says whether a client that reads a stream sees the event with the count of tokens.
    """

    def __init__(self, note: Note, *, shows_usage: bool) -> None:
        self._note, self._shows_usage = note, shows_usage
        self.num_gpus = 0.0  # of the model's engine
        self._counted: tuple[int, int] | None = None
        self._num_events = 0
        self._has_removed = False  # whether the last line was removed, so that the empty line after it goes as well

    def whole(self, body: bytes) -> None:
        """Reads the count of tokens from the body of an answer that is not a stream."""
        self._read(body)

    def lines(self, lines: bytes) -> bytes:
        """Reads the count of tokens from lines of a stream, if the lines hold the count. Returns the lines to send to
        the client.

        The event with the count is left out unless the client asked for it.
        """
        self._num_events += (b"\n" + lines).count(b"\ndata:")
        if not self._has_removed and (self._counted or not NO_CHOICES.search(lines)):
            return lines
        kept = []
        for line in lines.splitlines(keepends=True):
            ends_removed, self._has_removed = self._has_removed and not line.strip(), False
            if self._is_usage(line) and not self._shows_usage:
                self._has_removed = True
            elif not ends_removed:
                kept.append(line)
        return b"".join(kept)

    def end(self, seconds: float) -> None:
        """Reports the answer's tokens, and its GPU seconds: `seconds` times the number of GPUs of the engine (model
        server).

        `seconds` is the answer's share of the engine's time. If the client left a stream before its end, each event so
        far counts as one token of the completion. Nothing is reported for an answer without tokens.
        """
        prompt, completion = self._counted or (0, self._num_events)
        if prompt or completion:
            self._note(prompt, completion, seconds * self.num_gpus)

    def _is_usage(self, line: bytes) -> bool:
        return bool(NO_CHOICES.search(line)) and self._read(line.partition(b"data:")[2])

    def _read(self, text: bytes) -> bool:
        """Reads the count of tokens from the field `usage` of a JSON object. Returns whether the object has this
        field."""
        try:
            usage = from_json(text)["usage"]
            self._counted = int(usage["prompt_tokens"]), int(usage.get("completion_tokens") or 0)
        except (ValueError, LookupError, TypeError):
            return False
        return True
