"""What a model says of completions: the log-probabilities of their tokens, or their rewards."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig, PreTrainedModel

from dpo_core.admission import admit
from dpo_core.attention import shared_prompts
from dpo_core.batch import Batch, batches_of_like_lengths, collate, plan
from dpo_core.encode import EncodedGroup
from dpo_core.logps import token_logps
from dpo_core.model import adapter_off, is_reward_model, is_sharded
from dpo_core.scores import NUM_MEASURES

logger = logging.getLogger(__name__)

LEAST_FILL = 0.75  # of a padded batch that must be tokens


class Scorer(nn.Module):
    """Measures the completions of a batch: a causal model's log-probabilities of them, a reward model's rewards.

    Shares each prompt between its completions where the architecture allows it; that is tried once,
    on a few tokens, against the model's own forward. Where it does not, every completion stands behind
    its own copy of the prompt, in padded batches of like lengths.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.rewards = is_reward_model(model)
        alone = _depends_on_length(model.config.get_text_config())
        together = alone or _has_a_state(model.config.get_text_config()) or _departs(model, shared=True)
        self.shares_prompts = not together
        alone = alone or (together and _departs(model, shared=False))
        self.takes_batches = not alone
        if together:
            manner = f"by the model's own forward, one at a time ({alone})" if alone else "in batches"
            sentence = "%s cannot share prompts (%s); each completion is computed behind its own copy, %s."
            logger.warning(sentence, type(model).__name__, together, manner)

    def count_tokens(self, group: EncodedGroup) -> int:
        """What the group costs of a pack's budget."""
        copies = 1 if self.shares_prompts else len(group.completion_ids)
        return copies * len(group.prompt_ids) + sum(map(len, group.completion_ids))

    def count_shared_tokens(self, group: EncodedGroup) -> int:
        """What sharing saves."""
        return (len(group.completion_ids) - 1) * len(group.prompt_ids) if self.shares_prompts else 0

    def plan(
        self, groups: Sequence[EncodedGroup], *, num_ranks: int, max_tokens_per_pack: int
    ) -> list[list[list[int]]]:
        lengths = [self.count_tokens(group) for group in groups]
        if not self.shares_prompts and is_sharded(self.model):  # a pack is one forward, on every rank
            longest = max(len(group.prompt_ids) + max(map(len, group.completion_ids)) for group in groups)
            lengths = [longest * len(group.completion_ids) for group in groups]
        return plan(lengths, num_ranks=num_ranks, max_tokens_per_pack=max_tokens_per_pack)

    def collate(self, groups: Sequence[EncodedGroup]) -> Batch:
        return collate(groups, share_prompts=self.shares_prompts, with_ends=self.rewards).to(self.model.device)

    def forward(self, batch: Batch) -> Tensor:
        """[K, NUM_MEASURES] of each completion, float32: log-probability, that of its head, and tokens that were the
        likeliest; or the outputs of a reward model's head, and zeros."""
        if self.rewards:
            outputs = self._outputs(batch)
            return pad(outputs, (0, NUM_MEASURES - outputs.shape[1]))
        logps, correct = self.token_logps(batch)
        columns = torch.stack([logps, logps * batch.in_head, correct.to(logps.dtype)], 1)
        return columns.new_zeros(batch.num_completions, NUM_MEASURES).index_add(0, batch.completion_of_row, columns)

    def _outputs(self, batch: Batch) -> Tensor:
        if not self.takes_batches:
            return _plain_rewards(self.model, batch)
        return _rewards(self.model, batch, shared=self.shares_prompts)

    def token_logps(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """[R] log-probabilities, and whether each target was the likeliest token."""
        if not self.takes_batches:
            return _plain_logps(self.model, batch)
        return _logps(self.model, batch, shared=self.shares_prompts)


@torch.no_grad()
def score_reference(
    reference: PreTrainedModel, groups: Sequence[EncodedGroup], *, max_tokens_per_pack: int
) -> list[EncodedGroup]:
    """The groups with what the reference says of their completions; an adapter on it is off meanwhile."""
    admit(groups, reference)
    scorer = Scorer(reference)
    scored = list(groups)
    for pack in scorer.plan(groups, num_ranks=1, max_tokens_per_pack=max_tokens_per_pack)[0]:
        with adapter_off(reference):
            measures = iter(scorer(scorer.collate([groups[i] for i in pack])).tolist())
        for i in pack:
            logps, head_logps, _ = zip(*(next(measures) for _ in groups[i].completion_ids), strict=True)
            scored[i] = replace(groups[i], ref_logps=logps, ref_head_logps=head_logps)
    return scored


@torch.no_grad()
def reference_token_logps(
    reference: PreTrainedModel, groups: Sequence[EncodedGroup], *, max_tokens_per_pack: int
) -> list[list[list[float]]]:
    """Of each group, completion and token, in nats; an adapter on the reference is off meanwhile."""
    admit(groups, reference)
    scorer = Scorer(reference)
    found: list[list[list[float]]] = [[] for _ in groups]
    for pack in scorer.plan(groups, num_ranks=1, max_tokens_per_pack=max_tokens_per_pack)[0]:
        batch = scorer.collate([groups[i] for i in pack])
        with adapter_off(reference):
            logps, _ = scorer.token_logps(batch)
        rows = iter(logps.split_with_sizes(batch.num_completion_tokens.tolist()))
        for i in pack:
            found[i] = [next(rows).tolist() for _ in groups[i].completion_ids]
    return found


def _hidden(model: PreTrainedModel, batch: Batch, *, shared: bool) -> Tensor:
    """[T, H] behind the last layer."""
    if not shared:
        return _hidden_apart(model, batch)
    with shared_prompts(model):
        hidden: Tensor = model.base_model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            segments=batch.segments,
            use_cache=False,
        ).last_hidden_state[0]
    return hidden


def _hidden_apart(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Each segment by itself. In a causal model, padding behind it changes nothing."""
    lengths = [segment.stop - segment.start for segment in batch.segments]
    streams = batch.input_ids.split_with_sizes(lengths)
    found: dict[int, Tensor] = {}
    for places in batches_of_like_lengths(lengths, 0.0 if is_sharded(model) else LEAST_FILL):
        ids = pad_sequence([streams[i] for i in places], batch_first=True)
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        found |= {i: state[: lengths[i]] for i, state in zip(places, states, strict=True)}
    return torch.cat([found[i] for i in range(len(lengths))])


def _rewards(model: PreTrainedModel, batch: Batch, *, shared: bool) -> Tensor:
    """[K, outputs of the head], read at the last token of each completion, as transformers and vLLM do."""
    hidden = _hidden(model, batch, shared=shared)
    found: Tensor = cast(Any, model).score(hidden.index_select(0, batch.ends))
    return found.float()


def _logps(model: PreTrainedModel, batch: Batch, *, shared: bool) -> tuple[Tensor, Tensor]:
    hidden = _hidden(model, batch, shared=shared)
    head, config = cast(Any, model).get_output_embeddings(), model.config.get_text_config()
    # The names that architectures have for a factor of the logits: Cohere's multiplies, Granite's divides.
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    rows = hidden.index_select(0, batch.rows)
    return token_logps(
        rows if scale == 1 else rows * scale,
        head.weight,
        getattr(head, "bias", None),
        batch.targets,
        soft_cap=getattr(config, "final_logit_softcapping", None),
    )


def _plain_rewards(model: PreTrainedModel, batch: Batch) -> Tensor:
    """One completion after the other."""
    streams = (batch.input_ids[None, segment.start : segment.stop] for segment in batch.segments)
    states = [model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1] for ids in streams]
    found: Tensor = cast(Any, model).score(torch.stack(states))
    return found.float()


def _plain_logps(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """From the model's own logits, one completion after the other."""
    logps, correct = [], []
    rows, targets = batch.rows, batch.targets
    sizes = batch.num_completion_tokens.tolist()
    for segment, own_rows, ids in zip(
        batch.segments, rows.split_with_sizes(sizes), targets.split_with_sizes(sizes), strict=True
    ):
        stream = batch.input_ids[None, segment.start : segment.stop]
        logits = model(input_ids=stream, use_cache=False).logits[0, own_rows - segment.start].float()
        logps.append(logits.log_softmax(1).gather(1, ids[:, None])[:, 0])
        correct.append(logits.argmax(1) == ids)
    return torch.cat(logps), torch.cat(correct)


# What architectures raise on arguments that they do not know.
_REFUSALS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def _has_a_state(config: PretrainedConfig) -> str:
    """Layers that read the stream as a whole, in ways that a small example may not show."""
    return ", ".join(sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}))


def _depends_on_length(config: PretrainedConfig) -> str:
    """Rotary positions that stretch with the longest sequence of a batch, if that is long enough."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    kinds = [kind for kind in ("dynamic", "longrope") if any(part.get("rope_type") == kind for part in by_layer)]
    return ", ".join(f"{kind} positions" for kind in kinds)


@torch.no_grad()
def _departs(model: PreTrainedModel, *, shared: bool) -> str:
    """How a pack departs from this model's own answers on a small example; empty where it does not."""
    ids = [i % model.config.get_text_config().vocab_size for i in range(3, 24)]
    example = [EncodedGroup(ids[:7], (ids[7:11], ids[11:16]), None, 1), EncodedGroup(ids[16:17], (ids[17:],), None, 2)]
    rewards = is_reward_model(model)
    packed, alone = (
        collate(example, share_prompts=share, with_ends=rewards).to(model.device) for share in (shared, False)
    )
    try:
        found = _rewards(model, packed, shared=shared) if rewards else _logps(model, packed, shared=shared)[0]
    except _REFUSALS as error:
        return f"{type(error).__name__}: {error}"
    plain = _plain_rewards(model, alone) if rewards else _plain_logps(model, alone)[0]
    difference = (found - plain).abs().max().item()
    tolerated = 2e-4 if model.dtype == torch.float32 else 0.3
    return "" if difference < tolerated else f"its answers differ by {difference:.2g}"
