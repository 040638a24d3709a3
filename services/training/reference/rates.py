"""Which scorer of the reference ends sooner: the trainer's own forward, or an engine that may have to be loaded.

What was measured in a job is kept beside the prepared data, for the jobs after it.
"""

from pydantic import ValidationError

from services import storage
from services.contract import Contract

UNKNOWN_LOADING_SECONDS = 60.0  # of an engine that was never loaded here


class Rate(Contract):
    """How fast one scorer is with one model. Tokens are those of the prepared data: each prompt counts once."""

    tokens_per_second: float
    loading_seconds: float = 0.0

    def seconds(self, num_tokens: int) -> float:
        """Of all of them, loading included."""
        return self.loading_seconds + num_tokens / self.tokens_per_second


def read(uri: str) -> Rate | None:
    """None: it was never measured."""
    try:
        return Rate.model_validate_json(storage.read_bytes(uri))
    except (FileNotFoundError, ValidationError):
        return None


def write(uri: str, rate: Rate) -> None:
    storage.write_bytes(uri, rate.model_dump_json().encode())


def in_words(own: Rate, engine: Rate | None, num_tokens: int) -> str:
    """The figures, of a sentence on the trainer's own forward."""
    forward = f"it needs about {own.seconds(num_tokens):.0f} s for {num_tokens} tokens"
    if engine is None:
        return f"{forward}, and an engine is not loaded for less than {UNKNOWN_LOADING_SECONDS:.0f} s"
    loading = f", {engine.loading_seconds:.0f} s of them for its loading" if engine.loading_seconds else ""
    return f"{forward}, the deployed engine {engine.seconds(num_tokens):.0f} s{loading}"


def pays(own: Rate, engine: Rate | None, num_tokens: int) -> bool:
    """Of an unknown engine: whether loading it to measure it costs less than the forward."""
    if engine is None:
        return own.seconds(num_tokens) > UNKNOWN_LOADING_SECONDS
    return engine.seconds(num_tokens) < own.seconds(num_tokens)
