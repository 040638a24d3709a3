"""The reference as the trainer computes it: the policy's own forward, before it is trained. Runs in Ray tasks."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpo_core.encode import EncodedGroup
from services import storage
from services.contract import AttemptSpec
from services.training.dataset import Dataset, Part, read_part, write_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_TOKENS_PER_PACK = 4096


def score_part(spec: AttemptSpec, dataset: Dataset, uri: str, part: Part) -> Part:
    """Writes the scores of a part to the folder `uri`."""
    from dpo_core.scorer import score_reference

    groups = list(read_part(dataset, part))
    scored = score_reference(_reference(spec), groups, max_tokens_per_pack=_tokens_per_pack(spec))
    return write_scores(uri, part, scored)


def token_logps(spec: AttemptSpec, groups: Sequence[EncodedGroup]) -> list[list[list[float]]]:
    """Of each group, completion and token, in nats."""
    from dpo_core.scorer import reference_token_logps

    return reference_token_logps(_reference(spec), groups, max_tokens_per_pack=_tokens_per_pack(spec))


def _reference(spec: AttemptSpec) -> "PreTrainedModel":
    return _load(spec.model_source, "cuda" if spec.num_gpus_per_worker else "cpu")


@functools.cache
def _load(model_source: str, device: str) -> "PreTrainedModel":
    """Once per process."""
    # Imported here because it takes eight seconds of a core, and the driver does without.
    import torch

    from dpo_core.model import load_policy

    policy = load_policy(storage.fetch(model_source), device=torch.device(device))
    policy.train(False)
    return policy


def _tokens_per_pack(spec: AttemptSpec) -> int:
    return spec.config.max_tokens_per_pack or max(spec.config.max_length, LEAST_TOKENS_PER_PACK)
