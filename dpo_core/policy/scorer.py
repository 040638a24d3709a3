"""Computes what a model gives the completions of some groups: log-probabilities or, for a reward model, rewards. A
group is a prompt with its completions."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from dpo_core.encoding.encode import EncodedGroup
from dpo_core.models.architecture import is_reward_model, is_sharded
from dpo_core.models.model import adapter_off, check_policy
from dpo_core.policy.admission import admit, check_ids
from dpo_core.policy.batch import Batch, collate, plan
from dpo_core.policy.forward import Logps, packed_logps, packed_rewards, plain_logps, plain_rewards
from dpo_core.policy.measures import NUM_MEASURES
from dpo_core.policy.probe import probe

logger = logging.getLogger(__name__)

Plan = tuple[tuple[tuple[int, ...], ...], ...]  # by rank and pack: groups, as indices


class Scorer(nn.Module):
    """Measures the completions of a batch: their log-probabilities under a causal model, or the rewards that a reward
    model gives them.

    If the architecture allows it, the scorer computes each prompt once for all its completions. The constructor tests
    this: it compares the results on a few tokens with those of the architecture's own forward, on a small copy of the
    model if one can be made. If the results differ, every completion follows its own copy of the prompt, and
    completions are computed in padded batches of similar lengths, or one at a time.

    With `balances`, the scorer also measures how a mixture of experts spreads tokens over its experts. It does so only
    if the model is no reward model, its config says that training balances the experts, and the balancing loss that is
    computed here equals the architecture's own in the test.
    """

    def __init__(self, model: PreTrainedModel, *, balances: bool = False) -> None:
        super().__init__()
        check_policy(model)
        self.model = model
        self.dtype = model.dtype  # in which the model computes; shards of trained weights are always float32
        self.rewards = is_reward_model(model)
        self.manner = probe(model)
        self.shares_prompts, self.takes_batches = not self.manner.no_sharing, not self.manner.no_batches
        self.experts = self.manner.experts if balances else None
        if balances and self.manner.no_balance:
            sentence = "The load-balancing loss of %s's experts is not added: %s."
            logger.warning(sentence, type(model).__name__, self.manner.no_balance)
        if no_batches := self.manner.no_batches:
            way = f"one row at a time ({no_batches})"
        else:
            way = "in batches of several rows"
        if no_sharing := self.manner.no_sharing:
            sentence = (
                "%s cannot compute a prompt once for several completions (%s). It computes the prompt for each one, %s."
            )
            logger.warning(sentence, type(model).__name__, no_sharing, way)

    def count_tokens(self, group: EncodedGroup) -> int:
        """Returns the number of tokens of the group (a prompt with its completions) that the model computes. The prompt
        counts once, or once for each completion if completions cannot share their prompt."""
        copies = 1 if self.shares_prompts else len(group.completion_ids)
        return copies * len(group.prompt_ids) + sum(map(len, group.completion_ids))

    def count_shared_tokens(self, group: EncodedGroup) -> int:
        """Returns the number of tokens of the group (a prompt with its completions) that the model need not compute,
        because the completions share one copy of the prompt."""
        return (len(group.completion_ids) - 1) * len(group.prompt_ids) if self.shares_prompts else 0

    def plan(self, groups: Sequence[EncodedGroup], *, num_ranks: int, max_tokens_per_pack: int) -> Plan:
        """Distributes the groups (prompts with their completions) over `num_ranks` ranks (processes) and packs, such
        that all ranks compute about the same number of tokens.

        A pack holds the groups that go through one forward pass together. It has at most `max_tokens_per_pack` tokens,
        unless it has only one group, which may be longer. In the result, `plan[rank][pack]` has the pack's groups, as
        indices into `groups`.
        """
        lengths = [self.count_tokens(group) for group in groups]
        if not self.shares_prompts and is_sharded(self.model):  # each pack is one forward, which all ranks run together
            longest = max(len(group.prompt_ids) + max(map(len, group.completion_ids)) for group in groups)
            lengths = [longest * len(group.completion_ids) for group in groups]
        return _planned(tuple(lengths), num_ranks, max_tokens_per_pack)

    def collate(self, groups: Sequence[EncodedGroup]) -> Batch:
        """Returns the groups (prompts with their completions) as one batch on the model's device. Raises ValueError if
        a group has no token ids, because it is an outline."""
        check_ids(groups)
        with_ends = self.rewards or self.experts is not None
        return collate(groups, share_prompts=self.shares_prompts, with_ends=with_ends).to(self.model.device)

    def table(self, groups: Sequence[EncodedGroup]) -> Tensor:
        """Returns a table of zeros with a row for each completion of the groups (prompts with their completions), and
        the columns that `forward` fills."""
        columns = NUM_MEASURES + (2 * self.experts.number if self.experts else 0)
        return torch.zeros(sum(len(g.completion_ids) for g in groups), columns, device=self.model.device)

    def forward(self, batch: Batch) -> Tensor:
        """Computes the log-probabilities or rewards of the completions in the batch. Returns [K, NUM_MEASURES] float32:
        a row for each of K completions. For a language model the columns are:

        - the log-probability of the completion
        - the log-probability of the completion's first tokens: as many as the shortest completion of its group has
        - the number of its tokens that the model found the likeliest of all tokens

        For a reward model the columns are the outputs of the model's head, followed by zeros. If the scorer measures
        how routers spread tokens over N experts, 2N more columns follow; `Experts.spread` explains them.
        """
        if self.rewards:
            outputs = self._outputs(batch)
            return pad(outputs, (0, NUM_MEASURES - outputs.shape[1]))
        logps, correct, spread = self._logps(batch)
        columns = torch.stack([logps, logps * batch.in_head, correct.to(logps.dtype)], 1)
        sums = columns.new_zeros(batch.num_completions, NUM_MEASURES).index_add(0, batch.completion_of_row, columns)
        return torch.cat([sums, spread], 1) if self.experts else sums

    def _outputs(self, batch: Batch) -> Tensor:
        if not self.takes_batches:
            return plain_rewards(self.model, batch)
        return packed_rewards(self.model, batch, shared=self.shares_prompts)

    def token_logps(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Computes the log-probabilities of the batch's targets, the R tokens that count in the loss. Returns two
        tensors:

        - the log-probability of each target, [R]
        - whether the target was the likeliest of all tokens, [R]
        """
        logps, correct, _ = self._logps(batch)
        return logps, correct

    def _logps(self, batch: Batch) -> Logps:
        if not self.takes_batches:
            return plain_logps(self.model, batch, experts=self.experts)
        shared = self.shares_prompts
        return packed_logps(self.model, batch, self.manner.logits, shared=shared, experts=self.experts)


@lru_cache(maxsize=64)  # a step asks again for what was planned while its groups were loaded
def _planned(lengths: tuple[int, ...], num_ranks: int, max_tokens_per_pack: int) -> Plan:
    ranks = plan(lengths, num_ranks=num_ranks, max_tokens_per_pack=max_tokens_per_pack)
    return tuple(tuple(map(tuple, packs)) for packs in ranks)


@torch.no_grad()
def score_reference(
    reference: PreTrainedModel, groups: Sequence[EncodedGroup], *, max_tokens_per_pack: int
) -> list[EncodedGroup]:
    """Returns copies of the groups (prompts with their completions) that have the reference's log-probabilities of the
    completions. The reference may be the policy itself with an adapter that is being trained; the adapter is off while
    the function computes. A forward pass has at most `max_tokens_per_pack` tokens, unless a single group is longer."""
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
    """Returns the reference's log-probability, in nats, of each token that counts in the loss. `[group][completion]` of
    the result is a list of these log-probabilities; a group is a prompt with its completions. The reference may be the
    policy itself with an adapter that is being trained; the adapter is off while the function computes. A forward pass
    has at most `max_tokens_per_pack` tokens, unless a single group is longer."""
    admit(groups, reference)
    scorer = Scorer(reference)
    logps_by_group: list[list[list[float]]] = [[] for _ in groups]
    for pack in scorer.plan(groups, num_ranks=1, max_tokens_per_pack=max_tokens_per_pack)[0]:
        batch = scorer.collate([groups[i] for i in pack])
        with adapter_off(reference):
            logps, _ = scorer.token_logps(batch)
        rows = iter(logps.split_with_sizes(batch.num_completion_tokens.tolist()))
        for i in pack:
            logps_by_group[i] = [next(rows).tolist() for _ in groups[i].completion_ids]
    return logps_by_group
