"""Decides which of two would be the first to finish scoring rows with the reference model: vLLM, or the trainer's own
forward pass.

If vLLM has to load the model first, the time of loading counts. Speeds that one job measured are stored beside the
prepared data, for later jobs.
"""

from pydantic import ValidationError

from services import storage
from services.contract import Contract

UNKNOWN_LOADING_SECONDS = 60.0  # assumed for an engine that was never loaded here


class Rate(Contract):
    """The measured speed, in tokens per second, with which vLLM or the trainer scores rows with one model.
    `loading_seconds` is the time that loading the model takes first.

    The tokens of a row are those of its prompt, counted once, and those of its completions.
    """

    tokens_per_second: float
    loading_seconds: float = 0.0

    def seconds(self, num_tokens: int) -> float:
        """Returns the seconds for loading the model and scoring `num_tokens` tokens."""
        return self.loading_seconds + num_tokens / self.tokens_per_second


def read(uri: str) -> Rate | None:
    """Returns the speed that is stored at `uri`, or None if no readable speed is stored there."""
    try:
        return Rate.model_validate_json(storage.read_bytes(uri))
    except (FileNotFoundError, ValidationError):
        return None


def write(uri: str, rate: Rate) -> None:
    storage.write_bytes(uri, rate.model_dump_json().encode())


def in_words(trainer: Rate, engine: Rate | None, num_tokens: int) -> str:
    """Returns, as a part of a sentence, how long the trainer and the vLLM engine would need to score `num_tokens`
    tokens. `engine` is None if the engine's speed was never measured."""
    forward = f"they need about {trainer.seconds(num_tokens):.0f} s for {num_tokens} tokens"
    if engine is None:
        return f"{forward}, and loading vLLM pays only if they need more than {UNKNOWN_LOADING_SECONDS:.0f} s"
    loading = f", of which {engine.loading_seconds:.0f} s for loading the model" if engine.loading_seconds else ""
    return f"{forward}, and vLLM would need {engine.seconds(num_tokens):.0f} s{loading}"


def pays(trainer: Rate, engine: Rate | None, num_tokens: int) -> bool:
    """Whether the vLLM engine would score `num_tokens` tokens sooner than the trainer's own forward pass.

    If the engine's speed was never measured (`engine` is None), the result is whether the trainer would need longer
    than UNKNOWN_LOADING_SECONDS, a guess of the time that loading the engine takes.
    """
    if engine is None:
        return trainer.seconds(num_tokens) > UNKNOWN_LOADING_SECONDS
    return engine.seconds(num_tokens) < trainer.seconds(num_tokens)
