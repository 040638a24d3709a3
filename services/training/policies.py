"""The model that a job begins with, or why no attempt could train it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from services.contract import Failed
from services.training.reports.reporting import JobFailed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load(folder: Path, device: "torch.device") -> "PreTrainedModel":
    """Raises JobFailed for a model that transformers does not know, or that cannot be trained as it is."""
    # Imported here because it takes eight seconds of a core, and the driver works without it.
    from dpo_core.models.model import load_policy

    try:
        return load_policy(folder, device=device)
    except (ValueError, ImportError) as error:  # a quantized model may need a library that is not installed
        raise _unusable(error) from error


@contextmanager
def refusals() -> Iterator[None]:
    """Turns UnusableModel, which a model's first forward may raise, into JobFailed."""
    from dpo_core.models.architecture import UnusableModel

    try:
        yield
    except UnusableModel as error:
        raise _unusable(error) from error


def _unusable(error: Exception) -> JobFailed:
    message = f"The model cannot be trained: {error}"
    return JobFailed(Failed(code="invalid_model", message=message, param="model"))
