"""Computes the reference model's log-probabilities with the trainer's own forward pass, in place of a deployment. The
functions run in Ray tasks."""

import functools
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpo_core.encoding.encode import EncodedGroup
from services.contract import AttemptSpec, Failed, Weights
from services.training import policies
from services.training.data.dataset import Dataset, Part, read_part, write_scores
from services.training.data.encoding import load
from services.training.reports.reporting import JobFailed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_TOKENS_PER_PACK = 4096


def score_part(spec: AttemptSpec, dataset: Dataset, uri: str, part: Part) -> Part:
    """Scores the groups (prompts with completions) of one part (a file of groups) of the dataset, and writes the scores
    to a file in the folder `uri`. A score is the log-probability of a completion under the reference model.

    Returns a copy of `part` with the sha256 of the new file filled in.
    """
    from dpo_core.policy.scorer import score_reference

    _use_cores(alone=len(dataset.parts) == 1)
    groups = list(read_part(dataset, part))
    with policies.unusable_models_fail_the_job(policies.REFERENCE):
        scored = score_reference(_reference(spec), groups, max_tokens_per_pack=_tokens_per_pack(spec))
    return write_scores(uri, part, scored, heads=spec.config.objective.traits.needs_reference_heads)


def token_logps(spec: AttemptSpec, groups: Sequence[EncodedGroup]) -> list[list[list[float]]]:
    """Computes the reference model's log-probability, in nats, of each token that counts in the loss.
    `[group][completion]` of the result is a list of these log-probabilities; a group is a prompt with its
    completions."""
    from dpo_core.policy.scorer import reference_token_logps

    with policies.unusable_models_fail_the_job(policies.REFERENCE):
        return reference_token_logps(_reference(spec), groups, max_tokens_per_pack=_tokens_per_pack(spec))


def check_reference(spec: AttemptSpec, limit: int) -> None:
    """Raises JobFailed if the job cannot use its reference model, for one of two reasons:

    - The reference model's tokenizer differs from that of the model that the job trains.
    - The reference model cannot read `limit` tokens, the most that a prompt and one completion of the job may have.
    """
    start, reference = load(spec.model_source), load(spec.reference_model)
    differing = len(start.tokenizer.get_vocab().items() ^ reference.tokenizer.get_vocab().items())
    if differing:
        message = (
            f"The reference model has another tokenizer than the model that the job trains: {differing} tokens or ids "
            "differ. Choose a reference model of the same family."
        )
    elif reference.positions < limit:
        message = (
            f"The reference model takes only {reference.positions} tokens, but rows of this job may have {limit}; "
            f"set x_raydpo.max_length to {reference.positions}, or choose another reference model."
        )
    else:
        return
    raise JobFailed(Failed(code="reference_mismatch", message=message, param="x_raydpo.reference.model"))


def tokens_per_second(spec: AttemptSpec, groups: Sequence[EncodedGroup]) -> float:
    """Measures the speed of the reference model's forward pass on `groups`, in tokens per second.

    Loading the model and a first forward pass are not counted.
    """
    _use_cores(alone=True)
    token_logps(spec, groups[:1])
    began = time.perf_counter()
    token_logps(spec, groups)
    return sum(group.num_tokens for group in groups) / (time.perf_counter() - began)


def _use_cores(*, alone: bool) -> None:
    """Sets how many CPU cores torch uses in this Ray task: all cores if no other task scores at the same time
    (`alone`), or one core.

    If this function is not called, torch uses one core, which Ray sets because each task reserves one CPU.
    """
    import torch

    torch.set_num_threads((os.cpu_count() or 1) if alone else 1)


def _reference(spec: AttemptSpec) -> "PreTrainedModel":
    device = "cuda" if spec.num_gpus_per_worker else "cpu"
    return _load(spec.reference_model, spec.weights.model_dump_json(), device)


@functools.cache
def _load(source: str, weights: str, device: str) -> "PreTrainedModel":
    """Returns the reference model. Each process loads it only once. `weights` is a `Weights` object (the job's
    precision and quantization), written as JSON so that it can be a key of the function's cache."""
    import torch

    reference = policies.load_reference(source, Weights.model_validate_json(weights), torch.device(device))
    reference.train(False)
    return reference


def _tokens_per_pack(spec: AttemptSpec) -> int:
    return spec.config.max_tokens_per_pack or max(spec.config.max_length, LEAST_TOKENS_PER_PACK)
