"""Runs a model on a batch of prompts and completions. There are three ways: all completions in one row of tokens, all
in padded batches, or one at a time by the model's own forward."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig, PreTrainedModel

from dpo_core.models.architecture import is_sharded
from dpo_core.policy.attention import shared_prompts
from dpo_core.policy.batch import Batch, batches_of_like_lengths
from dpo_core.policy.logps import token_logps
from dpo_core.policy.routing import Experts, by_completion

LEAST_FILL = 0.75  # the least share of tokens, not padding, in a padded batch


@dataclass(frozen=True)
class Logits:
    """How a model turns the outputs of its head (the output layer) into logits: it multiplies the outputs by `scale`,
    then limits them to the range from -`cap` to `cap` with tanh."""

    scale: float = 1.0
    cap: float | None = None


# The names under which configs of architectures have a factor of the logits, and a cap of the logits.
_MULTIPLIES = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVIDES = ("logits_scaling", "logits_mup_width_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def readings(config: PretrainedConfig) -> list[Logits]:
    """Returns all ways in which a model may turn the outputs of its head (the output layer) into logits, judging by the
    factors and caps in the model's config. The likeliest way is first.

    The config alone does not decide: HyperCLOVA X multiplies by a factor by which other architectures divide, and some
    model classes ignore factors and caps in their config.
    """
    factor, divisor = (math.prod(_numbers(config, names)) for names in (_MULTIPLIES, _DIVIDES))
    caps = [*_numbers(config, _CAPS), None]
    return list(dict.fromkeys(Logits(*reading) for reading in product((factor / divisor, factor * divisor, 1.0), caps)))


def _numbers(config: PretrainedConfig, names: Sequence[str]) -> list[float]:
    """Returns the values that the config has under `names`, without values that are 0 or no numbers. For example, MPT's
    config has a word where other configs have a number."""
    values = [getattr(config, name, None) for name in names]
    return [float(value) for value in values if isinstance(value, int | float) and value]


def decoder(model: PreTrainedModel) -> nn.Module:
    """Returns the submodule of the model that computes the hidden states. The model's head reads these states."""
    inner: nn.Module = model.base_model  # the model itself, if transformers has no name for its decoder
    return inner if inner is not model else getattr(model, "model", model)


class Logps(NamedTuple):
    """The results of a language model for a batch of K completions: the log-probability of each target (`logps`; a
    target is a token that counts in the loss), whether each target was the likeliest token (`correct`), and how routers
    spread tokens over experts (`spread`)."""

    logps: Tensor  # [R] log-probability of each target
    correct: Tensor  # [R] whether the target was the likeliest token
    spread: Tensor  # [K, 2N] how routers spread each completion and its prompt over N experts; N is 0 unless asked for


def packed_logps(
    model: PreTrainedModel, batch: Batch, logits: Logits, *, shared: bool, experts: Experts | None = None
) -> Logps:
    """Returns the log-probabilities of the batch's targets (the tokens that count in the loss) and, if `experts` are
    given, how routers spread the batch's tokens over them.

    `logits` says how the model turns its head's outputs into logits. If completions share prompts (`shared`), one
    forward pass computes all of them. If they do not, completions of similar lengths are padded and computed together.
    """
    states = _states(model, batch, experts, shared=shared)
    head = cast(Any, model).get_output_embeddings()
    rows = states.hidden.index_select(0, batch.rows)
    logps, correct = token_logps(
        rows if logits.scale == 1 else rows * logits.scale,
        head.weight,
        getattr(head, "bias", None),
        batch.targets,
        soft_cap=logits.cap,
    )
    return Logps(logps, correct, by_completion(batch, states.spread))


def packed_rewards(model: PreTrainedModel, batch: Batch, *, shared: bool) -> Tensor:
    """Returns a reward model's outputs at the last token of each of K completions, [K, outputs]. transformers and vLLM
    read rewards at the same token.

    If completions share prompts (`shared`), one forward pass computes all of them. If they do not, completions of
    similar lengths are padded and computed together.
    """
    hidden = _states(model, batch, None, shared=shared).hidden
    outputs: Tensor = cast(Any, model).score(hidden.index_select(0, batch.ends))
    return outputs.float()


class _States(NamedTuple):
    """The results of a model's decoder for T tokens: the hidden states, and how routers spread the tokens over experts.
    For a padded batch, the first dimension T is split into two: rows, and tokens of a row.
    """

    hidden: Tensor  # [T, H] hidden states after the last layer
    spread: Tensor  # [T, 2N] how routers spread each token over N experts; N is 0 unless asked for


def _states(model: PreTrainedModel, batch: Batch, experts: Experts | None, *, shared: bool) -> _States:
    """Runs the model's decoder on the T tokens of the batch. `shared` says whether the completions of a prompt share
    one copy of it. If `experts` are given, the result also says how routers spread tokens over them."""
    if not shared:
        return _states_apart(model, batch, experts)
    with shared_prompts(model):
        states = _decode(
            model, experts, batch.input_ids[None], position_ids=batch.position_ids[None], segments=batch.segments
        )
    return _States(states.hidden[0], states.spread[0])


def _states_apart(model: PreTrainedModel, batch: Batch, experts: Experts | None) -> _States:
    """Runs the model's decoder on the T tokens of a batch in which each segment (range of tokens) holds its own prompt.
    Segments of similar lengths are padded and computed together. If `experts` are given, the result also says how
    routers spread tokens over them.

    In a causal model, padding after a segment does not change the segment's hidden states.
    """
    lengths = [segment.stop - segment.start for segment in batch.segments]
    streams = batch.input_ids.split_with_sizes(lengths)
    states_by_segment: dict[int, tuple[Tensor, Tensor]] = {}
    for places in batches_of_like_lengths(lengths, 0.0 if is_sharded(model) else LEAST_FILL):
        states = _decode(model, experts, pad_sequence([streams[i] for i in places], batch_first=True))
        for i, hidden, spread in zip(places, *states, strict=True):
            states_by_segment[i] = hidden[: lengths[i]], spread[: lengths[i]]
    hiddens, spreads = zip(*(states_by_segment[i] for i in range(len(lengths))), strict=True)
    return _States(torch.cat(hiddens), torch.cat(spreads))


def _decode(model: PreTrainedModel, experts: Experts | None, input_ids: Tensor, **arguments: object) -> _States:
    """Runs the model's decoder on a batch of token ids, [B, L]. The results have B and L as first dimensions. If
    `experts` are given, the result also says how routers spread tokens over them. `arguments` are further arguments of
    the decoder.
    """
    if experts is None:
        hidden = decoder(model)(input_ids=input_ids, use_cache=False, **arguments).last_hidden_state
        return _States(hidden, hidden.new_zeros(*input_ids.shape, 0))
    outputs = decoder(model)(input_ids=input_ids, use_cache=False, output_router_logits=True, **arguments)
    return _States(outputs.last_hidden_state, experts.spread(outputs.router_logits).view(*input_ids.shape, -1))


def plain_rewards(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Returns a reward model's outputs at the last token of each of K completions, [K, outputs]. The completions are
    computed one after the other."""
    streams = (batch.input_ids[None, segment.start : segment.stop] for segment in batch.segments)
    states = [decoder(model)(input_ids=ids, use_cache=False).last_hidden_state[0, -1] for ids in streams]
    outputs: Tensor = cast(Any, model).score(torch.stack(states))
    return outputs.float()


def plain_logps(model: PreTrainedModel, batch: Batch, *, experts: Experts | None = None) -> Logps:
    """Returns the log-probabilities of the batch's targets (the tokens that count in the loss) and, if `experts` are
    given, how routers spread the batch's tokens over them. The model's own forward computes the completions one after
    the other."""
    logps, correct, spreads = [], [], []
    rows, targets = batch.rows, batch.targets
    sizes = batch.num_completion_tokens.tolist()
    asked = {"output_router_logits": True} if experts else {}
    for segment, segment_rows, ids in zip(
        batch.segments, rows.split_with_sizes(sizes), targets.split_with_sizes(sizes), strict=True
    ):
        outputs = model(input_ids=batch.input_ids[None, segment.start : segment.stop], use_cache=False, **asked)
        logits = outputs.logits[0, segment_rows - segment.start].float()
        logps.append(logits.log_softmax(1).gather(1, ids[:, None])[:, 0])
        correct.append(logits.argmax(1) == ids)
        spreads.append(experts.spread(outputs.router_logits).sum(0) if experts else logits.new_zeros(0))
    return Logps(torch.cat(logps), torch.cat(correct), torch.stack(spreads))
