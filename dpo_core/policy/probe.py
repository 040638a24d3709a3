"""What may be done at once with a model: tried on a small example before the first step, never assumed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from dpo_core.encoding.encode import EncodedGroup
from dpo_core.models.architecture import UnusableModel, is_reward_model
from dpo_core.models.miniature import miniature, ropes
from dpo_core.policy.batch import Batch, collate
from dpo_core.policy.forward import Logits, decoder, packed_logps, packed_rewards, plain_logps, plain_rewards, readings

TOLERATED = 1e-4  # in float32, of the largest number compared and at least of 1
NUM_TOKENS = 30  # of the example: more than what a miniature has in force
# What architectures raise on what they do not know.
REFUSALS = (AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
ATTENTION = {"full_attention", "sliding_attention", "attention"}  # kinds of layers; "attention" beside recurrent ones


@dataclass(frozen=True)
class Manner:
    """How a model's answers are computed, and why not faster."""

    logits: Logits
    no_sharing: str = ""  # why completions do not share their prompt; empty: they do
    no_batches: str = ""  # why each is a forward of its own


@torch.no_grad()
def probe(model: PreTrainedModel) -> Manner:
    """The fastest manner in which a miniature of the model answers as its own forward does.

    Where there is no miniature, the model itself is tried on a few tokens, which show too little of it to share
    prompts, and in half precision too little to trust batches. Raises ValueError for a model that is not causal.
    """
    config = model.config.get_text_config()
    stretched = _depends_on_length(config)
    subject, no_sharing = _subject(model)
    _check_causal(subject)
    no_sharing = stretched or _has_a_state(config) or no_sharing
    place = 0
    if not no_sharing:
        no_sharing, place = _departs(subject, shared=True)
    coarse = f"{model.dtype} hides small differences" if subject is model and model.dtype != torch.float32 else ""
    no_batches = stretched or coarse
    if no_sharing and not no_batches:
        no_batches, place = _departs(subject, shared=False)
    return Manner(readings(config)[place], no_sharing, no_batches)


def _subject(model: PreTrainedModel) -> tuple[PreTrainedModel, str]:
    """What is tried in the model's place: a miniature, or the model itself and the reason."""
    for narrow in (True, False):
        try:
            small = miniature(model, narrow=narrow)
            _answer(small, _ids(small))
        except Exception as error:  # each architecture refuses what it cannot be in its own way
            reason = f"it has no miniature, {type(error).__name__}: {error}"
        else:
            return small, ""
    return model, reason


def _check_causal(model: PreTrainedModel) -> None:
    ids, half = _ids(model), NUM_TOKENS // 2
    first, second = (_answer(model, ids[:half] + behind)[:half] for behind in (ids[half:], ids[:half][::-1]))
    if _difference(first, second) > _tolerated(model, first):
        name = type(model).__name__
        raise UnusableModel(
            f"{name} sees the tokens that it is to predict; use a causal model (is_decoder, where it has one)."
        )


def _answer(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """[T, V] what the model's own forward says at each token, or [T, H] the hidden states of a reward model."""
    inputs = torch.tensor([list(ids)], device=model.device)
    if is_reward_model(model):
        return cast(Tensor, decoder(model)(input_ids=inputs, use_cache=False).last_hidden_state[0])
    return cast(Tensor, model(input_ids=inputs, use_cache=False).logits[0]).float().log_softmax(1)


def _departs(model: PreTrainedModel, *, shared: bool) -> tuple[str, int]:
    """How packs differ from the model's own answers on a small example, empty where they do not; and the place among
    `readings` of the one by which they agree."""
    packed, alone = (_example(model, share_prompts=share) for share in (shared, False))
    rewards, found = is_reward_model(model), readings(model.config.get_text_config())
    plain = plain_rewards(model, alone) if rewards else plain_logps(model, alone)[0]
    differences = []
    for place, logits in enumerate(found):
        try:
            if rewards:
                answer = packed_rewards(model, packed, shared=shared)
            else:
                answer, _ = packed_logps(model, packed, logits, shared=shared)
        except REFUSALS as error:
            return f"{type(error).__name__}: {error}", 0
        differences.append(_difference(answer, plain))
        if differences[-1] <= _tolerated(model, plain):
            return "", place
    return f"its answers differ by {differences[0]:.2g}", 0


def _example(model: PreTrainedModel, *, share_prompts: bool) -> Batch:
    """A pair behind a prompt, all longer than the windows of a miniature, and a demonstration."""
    ids = _ids(model)
    groups = [EncodedGroup(ids[:9], (ids[9:16], ids[16:22]), None, 1), EncodedGroup(ids[22:23], (ids[23:],), None, 2)]
    return collate(groups, share_prompts=share_prompts, with_ends=is_reward_model(model)).to(model.device)


def _ids(model: PreTrainedModel) -> list[int]:
    return [i % model.config.get_text_config().vocab_size for i in range(3, 3 + NUM_TOKENS)]


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest; infinite where one is no number."""
    return (ours.float() - theirs.float()).abs().max().nan_to_num(nan=torch.inf).item()


def _tolerated(model: PreTrainedModel, answer: Tensor) -> float:
    return TOLERATED * max(1.0, answer.abs().max().item()) if model.dtype == torch.float32 else 0.3


def _has_a_state(config: PretrainedConfig) -> str:
    """Layers that read the stream as a whole, in ways that a small example may not show."""
    names = ("layer_types", "layers_block_type", "block_types")
    kinds = {kind for name in names for kind in getattr(config, name, None) or ()}
    return ", ".join(sorted(kinds - ATTENTION))


def _depends_on_length(config: PretrainedConfig) -> str:
    """Rotary positions that stretch with the longest sequence of a batch, if that is long enough."""
    kinds = {rope.get("rope_type") for rope in ropes(config)}
    return ", ".join(f"{kind} positions" for kind in ("dynamic", "longrope") if kind in kinds)
