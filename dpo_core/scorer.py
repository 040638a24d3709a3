"""What a model says of completions: the log-probabilities of their tokens, or their rewards."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PretrainedConfig, PreTrainedModel

from dpo_core.attention import shared_prompts
from dpo_core.batch import Batch, collate, plan
from dpo_core.encode import EncodedGroup
from dpo_core.logps import token_logps
from dpo_core.model import adapter_off, is_reward_model
from dpo_core.scores import NUM_MEASURES

logger = logging.getLogger(__name__)


class Scorer(nn.Module):
    """Measures the completions of a batch: a causal model's log-probabilities of them, a reward model's rewards.

    Shares each prompt between its completions where the architecture allows it; that is tried once,
    on a few tokens, against the model's own forward. Where it does not, every completion runs
    through the model's own forward behind its own copy of the prompt.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.rewards = is_reward_model(model)
        self.shares_prompts = _can_share(model)

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
        return plan(lengths, num_ranks=num_ranks, max_tokens_per_pack=max_tokens_per_pack)

    def collate(self, groups: Sequence[EncodedGroup]) -> Batch:
        return collate(groups, share_prompts=self.shares_prompts, with_ends=self.rewards).to(self.model.device)

    def forward(self, batch: Batch) -> Tensor:
        """[K, NUM_MEASURES] of each completion, float32: log-probability, that of its head, and tokens that were the
        likeliest; or the outputs of a reward model's head, and zeros."""
        if self.rewards:
            outputs = _rewards(self.model, batch, shared=self.shares_prompts)
            return pad(outputs, (0, NUM_MEASURES - outputs.shape[1]))
        logps, correct = self.token_logps(batch)
        columns = torch.stack([logps, logps * batch.in_head, correct.to(logps.dtype)], 1)
        return columns.new_zeros(batch.num_completions, NUM_MEASURES).index_add(0, batch.completion_of_row, columns)

    def token_logps(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """[R] log-probabilities, and whether each target was the likeliest token."""
        return (_shared_logps if self.shares_prompts else _plain_logps)(self.model, batch)


@torch.no_grad()
def score_reference(
    reference: PreTrainedModel, groups: Sequence[EncodedGroup], *, max_tokens_per_pack: int
) -> list[EncodedGroup]:
    """The groups with what the reference says of their completions; an adapter on it is off meanwhile."""
    scorer = Scorer(reference)
    scored = list(groups)
    for pack in scorer.plan(groups, num_ranks=1, max_tokens_per_pack=max_tokens_per_pack)[0]:
        with adapter_off(reference):
            measures = iter(scorer(scorer.collate([groups[i] for i in pack])).tolist())
        for i in pack:
            logps, head_logps, _ = zip(*(next(measures) for _ in groups[i].completion_ids), strict=True)
            scored[i] = replace(groups[i], ref_logps=logps, ref_head_logps=head_logps)
    return scored


def _hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """[T, H] behind the last layer, prompts shared."""
    with shared_prompts(model):
        hidden: Tensor = model.base_model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            segments=batch.segments,
            use_cache=False,
        ).last_hidden_state[0]
    return hidden


def _rewards(model: PreTrainedModel, batch: Batch, *, shared: bool) -> Tensor:
    """[K, outputs of the head], read at the last token of each completion, as transformers and vLLM do."""
    if shared:
        hidden = _hidden(model, batch)
    else:
        streams = (batch.input_ids[None, segment.start : segment.stop] for segment in batch.segments)
        states = [model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0] for ids in streams]
        hidden = torch.cat(states)
    found: Tensor = cast(Any, model).score(hidden.index_select(0, batch.ends))
    return found.float()


def _shared_logps(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    hidden = _hidden(model, batch)
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


def _plain_logps(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
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


def _can_share(model: PreTrainedModel) -> bool:
    reason = _reads_the_whole_stream(model.config.get_text_config()) or _answers_differ(model)
    if reason:
        logger.warning("%s cannot share prompts (%s); each completion runs alone.", type(model).__name__, reason)
    return not reason


def _reads_the_whole_stream(config: PretrainedConfig) -> str:
    """What of an architecture depends on the stream as a whole, in ways that a small example may not show."""
    layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    ropes = {part.get("rope_type") for part in by_layer} & {"dynamic", "longrope"}
    return ", ".join(sorted(layers | {f"{kind} positions" for kind in ropes}))


@torch.no_grad()
def _answers_differ(model: PreTrainedModel) -> str:
    """How shared prompts depart from this model's own answers on a small example; empty where they do not."""
    ids = [i % model.config.get_text_config().vocab_size for i in range(3, 24)]
    example = [EncodedGroup(ids[:7], (ids[7:11], ids[11:16]), None, 1), EncodedGroup(ids[16:17], (ids[17:],), None, 2)]
    rewards = is_reward_model(model)
    packed, alone = (
        collate(example, share_prompts=share, with_ends=rewards).to(model.device) for share in (True, False)
    )
    try:
        shared = _rewards(model, packed, shared=True) if rewards else _shared_logps(model, packed)[0]
    except _REFUSALS as error:
        return f"{type(error).__name__}: {error}"
    plain = _rewards(model, alone, shared=False) if rewards else _plain_logps(model, alone)[0]
    difference = (shared - plain).abs().max().item()
    tolerated = 2e-4 if model.dtype == torch.float32 else 0.3
    return "" if difference < tolerated else f"its answers differ by {difference:.2g}"
