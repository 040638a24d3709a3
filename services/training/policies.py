"""The model that a job begins with, or why no attempt could train it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from services import storage
from services.contract import Failed
from services.training.reporting import JobFailed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load(model_source: str, device: "torch.device") -> "PreTrainedModel":
    """Raises JobFailed for a model that transformers does not know, or that cannot be trained as it is."""
    # Imported here because it takes eight seconds of a core, and the driver does without.
    from dpo_core.model import load_policy

    folder = storage.fetch(model_source)
    try:
        return load_policy(folder, device=device)
    except (ValueError, ImportError) as error:  # the last: of what a quantized model needs
        raise _unusable(error) from error


@contextmanager
def refusals() -> Iterator[None]:
    """What is found out about a model when it first computes ends the job, too."""
    from dpo_core.architecture import UnusableModel

    try:
        yield
    except UnusableModel as error:
        raise _unusable(error) from error


def _unusable(error: Exception) -> JobFailed:
    message = f"The model cannot be trained: {error}"
    return JobFailed(Failed(code="invalid_model", message=message, param="model"))
