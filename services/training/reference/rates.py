"""Decides whether the trainer's own forward or an engine, which may have to be loaded, scores the reference sooner.

Rates that one job measured are stored beside the prepared data for later jobs.
"""

from pydantic import ValidationError

from services import storage
from services.contract import Contract

UNKNOWN_LOADING_SECONDS = 60.0  # assumed for an engine that was never loaded here


class Rate(Contract):
    """The speed of one scorer with one model. Tokens are counted as in the prepared data: each prompt once."""

    tokens_per_second: float
    loading_seconds: float = 0.0

    def seconds(self, num_tokens: int) -> float:
        """Returns the time for all tokens, with the loading."""
        return self.loading_seconds + num_tokens / self.tokens_per_second


def read(uri: str) -> Rate | None:
    """Reads a stored rate. None: it was never measured."""
    try:
        return Rate.model_validate_json(storage.read_bytes(uri))
    except (FileNotFoundError, ValidationError):
        return None


def write(uri: str, rate: Rate) -> None:
    storage.write_bytes(uri, rate.model_dump_json().encode())


def in_words(trainer: Rate, engine: Rate | None, num_tokens: int) -> str:
    """Returns the figures, as a part of a sentence about the trainer's own forward."""
    forward = f"it needs about {trainer.seconds(num_tokens):.0f} s for {num_tokens} tokens"
    if engine is None:
        return f"{forward}, and loading an engine does not pay below {UNKNOWN_LOADING_SECONDS:.0f} s"
    loading = f", of which its loading takes {engine.loading_seconds:.0f} s" if engine.loading_seconds else ""
    return f"{forward}, the deployed engine {engine.seconds(num_tokens):.0f} s{loading}"


def pays(trainer: Rate, engine: Rate | None, num_tokens: int) -> bool:
    """Whether the engine ends sooner than the trainer's forward; for an unknown engine, its assumed loading counts."""
    if engine is None:
        return trainer.seconds(num_tokens) > UNKNOWN_LOADING_SECONDS
    return engine.seconds(num_tokens) < trainer.seconds(num_tokens)
