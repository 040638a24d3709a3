"""The reference as the trainer computes it: the policy's own forward, before it is trained. Runs in Ray tasks."""

import functools
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpo_core.encoding.encode import EncodedGroup
from services.contract import AttemptSpec, Precision
from services.training import policies
from services.training.data.dataset import Dataset, Part, read_part, write_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_TOKENS_PER_PACK = 4096


def score_part(spec: AttemptSpec, dataset: Dataset, uri: str, part: Part) -> Part:
    """Writes the scores of a part to the folder `uri`."""
    from dpo_core.policy.scorer import score_reference

    _use_cores(alone=len(dataset.parts) == 1)
    groups = list(read_part(dataset, part))
    with policies.refusals():
        scored = score_reference(_reference(spec), groups, max_tokens_per_pack=_tokens_per_pack(spec))
    return write_scores(uri, part, scored, heads=spec.config.objective.traits.needs_reference_heads)


def token_logps(spec: AttemptSpec, groups: Sequence[EncodedGroup]) -> list[list[list[float]]]:
    """Of each group, completion and token, in nats."""
    from dpo_core.policy.scorer import reference_token_logps

    with policies.refusals():
        return reference_token_logps(_reference(spec), groups, max_tokens_per_pack=_tokens_per_pack(spec))


def tokens_per_second(spec: AttemptSpec, groups: Sequence[EncodedGroup]) -> float:
    """How fast the forward is, once the model is loaded and has computed for the first time."""
    _use_cores(alone=True)
    token_logps(spec, groups[:1])
    began = time.perf_counter()
    token_logps(spec, groups)
    return sum(group.num_tokens for group in groups) / (time.perf_counter() - began)


def _use_cores(*, alone: bool) -> None:
    """All that there are, where no other part is scored beside; Ray's own count is the one CPU that a task reserves."""
    import torch

    torch.set_num_threads((os.cpu_count() or 1) if alone else 1)


def _reference(spec: AttemptSpec) -> "PreTrainedModel":
    device = "cuda" if spec.num_gpus_per_worker else "cpu"
    return _load(spec.reference_model, spec.weights.precision, device)


@functools.cache
def _load(source: str, precision: Precision, device: str) -> "PreTrainedModel":
    """Once per process."""
    import torch

    reference = policies.load_reference(source, precision, torch.device(device))
    reference.train(False)
    return reference


def _tokens_per_pack(spec: AttemptSpec) -> int:
    return spec.config.max_tokens_per_pack or max(spec.config.max_length, LEAST_TOKENS_PER_PACK)
