"""Measures how the routers of a mixture of experts spread tokens over the experts, and computes the loss that balances
them.

The loss is that of the Switch Transformer, arXiv 2101.03961, equations 4 to 6, in the form that transformers gives it:
all layers count together, and a token counts for every expert that it is sent to.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_core.models.architecture import is_reward_model
from dpo_core.policy.batch import Batch
from dpo_core.policy.measures import Measures

BALANCE = "aux_loss"  # the metric's name


@dataclass(frozen=True)
class Experts:
    """The experts of a mixture of experts that training balances: how many experts a layer has (`number`), how many of
    them a router chooses for each token (`chosen`), and the coefficient of the load-balancing loss."""

    number: int  # in a layer
    chosen: int  # by a router for each token
    coefficient: float  # of the load-balancing loss, which training adds to that of the objective

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Returns the bytes of memory that `spread` needs for one token in one layer of a model that computes in
        `dtype`. These are the bytes of the router's logits and of their float32 probabilities. The logits are held
        until all layers are computed. Autograd keeps the probabilities for the backward pass. The number is the same if
        the backward pass recomputes layers."""
        return self.number * (dtype.itemsize + torch.float32.itemsize)

    def spread(self, router_logits: Sequence[Tensor]) -> Tensor:
        """Returns how the routers spread T tokens over N experts, [T, 2N]. The first N numbers of a token say how many
        layers chose each expert for it. The other N numbers are the probabilities of each expert, summed over all
        layers. `router_logits` has one tensor [T, N] for each layer."""
        choices = probabilities = torch.zeros((), device=router_logits[0].device)
        for logits in router_logits:
            layer = logits.float().softmax(-1)
            chosen = layer.detach().topk(self.chosen).indices
            choices = choices + torch.zeros_like(layer).scatter_(-1, chosen, 1.0)
            probabilities = probabilities + layer
        return torch.cat([choices, probabilities], -1)

    def loss(self, measures: Measures) -> Tensor:
        """Returns the load-balancing loss, without its coefficient, of the completions in `measures` with their
        prompts. Completions that answer the prompt of another group (KTO needs such completions) do not count."""
        choices, probabilities = measures.spread.sum(0).chunk(2)
        rows = choices.sum() / self.chosen  # tokens, counted in each layer
        return self.number * (choices / rows) @ (probabilities / rows)


def balance_metrics(experts: Experts | None, measures: Measures) -> dict[str, Tensor]:
    """Returns a dictionary with the load-balancing loss, under the name that it has in TRL. Returns an empty dictionary
    if `experts` is None, because training then balances no experts.
    """
    return {BALANCE: experts.loss(measures)} if experts else {}


def experts_of(model: PreTrainedModel) -> Experts | None:
    """Returns the experts that training balances, judging by the model's config. Returns None if training balances
    none: the config does not ask for it, or the model is a reward model, for which transformers defines no
    load-balancing loss."""
    config = model.config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", None)
    number, chosen = (getattr(model, name, None) for name in ("num_experts", "num_experts_per_tok"))
    if not hasattr(config, "output_router_logits") or is_reward_model(model):
        return None
    return Experts(number, chosen, coefficient) if number and chosen and coefficient else None


def by_completion(batch: Batch, spread: Tensor) -> Tensor:
    """Sums `spread`, [T, 2N] for T tokens, over each completion and its prompt. Returns the sums, [K, 2N] for K
    completions. The batch must include the last token of each completion (`collate` with `with_ends`)."""
    if not spread.shape[1]:
        return spread.new_zeros(batch.num_completions, 0)
    cuts = sorted({edge for segment in batch.segments for edge in segment})
    place = {cut: index for index, cut in enumerate(cuts)}
    reads = [
        (completion, part)
        for completion, (prefix_start, prefix_stop, start, stop) in enumerate(batch.segments)
        for part in (*range(place[prefix_start], place[prefix_stop]), *range(place[start], place[stop]))
    ]
    parts = torch.stack([part.sum(0) for part in spread.split_with_sizes([b - a for a, b in pairwise(cuts)])])
    completions, read = torch.tensor(reads).to(spread.device, non_blocking=True).unbind(1)
    return spread.new_zeros(batch.num_completions, spread.shape[1]).index_add(0, completions, parts[read])
