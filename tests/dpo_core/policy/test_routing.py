"""Tests the loss that balances experts. The oracle is transformers' own loss of the same completions, padded."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import MixtralForCausalLM, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dpo_core.encoding.encode import EncodedGroup
from dpo_core.models.model import load_reward_model
from dpo_core.policy.measures import NUM_MEASURES, Measures
from dpo_core.policy.routing import Experts, balance_metrics, experts_of
from dpo_core.policy.scorer import Scorer


def own_loss(model: PreTrainedModel, groups: list[EncodedGroup]) -> Tensor:
    """Returns the loss that transformers computes from whole completions with their prompts, in one padded batch."""
    rows = [torch.tensor([*group.prompt_ids, *ids]) for group in groups for ids in group.completion_ids]
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    ids = pad_sequence(rows, batch_first=True)
    return model(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss


def measured(scorer: Scorer, groups: list[EncodedGroup]) -> Measures:
    return Measures(groups, scorer(scorer.collate(groups)))


def test_the_loss_is_that_of_transformers():
    logits = tuple(torch.randn(9, 6) for _ in range(3))
    experts = Experts(number=6, chosen=2, coefficient=0.1)
    table = torch.nn.functional.pad(experts.spread(logits), (NUM_MEASURES, 0))
    found = experts.loss(Measures([EncodedGroup([1], ([2],), None, 1)] * 9, table))
    torch.testing.assert_close(found, load_balancing_loss_func(logits, 6, 2))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared prompts", "copies of prompts"])
def test_a_prompt_counts_for_each_of_its_completions(kind, shared, make_mixture, pairs):
    model = make_mixture(kind)
    scorer = Scorer(model, balances=True)
    assert scorer.shares_prompts
    assert scorer.experts
    scorer.shares_prompts = shared
    found = scorer.experts.loss(measured(scorer, pairs))
    torch.testing.assert_close(found, own_loss(model, pairs), rtol=1e-5, atol=1e-6)


def test_completions_computed_one_at_a_time_are_measured_too(make_mixture, pairs):
    scorer = Scorer(make_mixture("mixtral"), balances=True)
    expected = measured(scorer, pairs).table
    scorer.shares_prompts = scorer.takes_batches = False
    torch.testing.assert_close(measured(scorer, pairs).table, expected, rtol=1e-4, atol=1e-4)


def test_completions_of_other_prompts_do_not_count(make_mixture, pairs):
    model = make_mixture("mixtral")
    scorer = Scorer(model, balances=True)
    rated = [replace(pair, ratings=(1.0, math.nan)) for pair in pairs]
    first = [
        replace(pair, completion_ids=pair.completion_ids[:1], ref_logps=None, ref_head_logps=None) for pair in pairs
    ]
    torch.testing.assert_close(scorer.experts.loss(measured(scorer, rated)), own_loss(model, first))


def test_only_what_the_models_config_balances_is_measured(make_policy, make_mixture, pairs, tmp_path):
    mixture = make_mixture("mixtral")
    assert experts_of(mixture) == Experts(number=4, chosen=2, coefficient=0.1)
    assert measured(Scorer(mixture), pairs).table.shape[1] == NUM_MEASURES  # as for a reference
    mixture.save_pretrained(tmp_path)
    others = [make_policy(), make_mixture("mixtral", router_aux_loss_coef=0.0), load_reward_model(tmp_path)]
    for model in others:
        scorer = Scorer(model, balances=True)
        assert scorer.experts is None
        assert balance_metrics(scorer.experts, measured(scorer, pairs)) == {}


class OtherLoss(MixtralForCausalLM):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        if outputs.aux_loss is not None:
            outputs.aux_loss = 2 * outputs.aux_loss
        return outputs


def test_a_loss_of_another_kind_is_not_added_and_this_is_said(make_mixture, caplog):
    scorer = Scorer(OtherLoss(make_mixture("mixtral").config).eval(), balances=True)
    assert scorer.experts is None
    assert "The load-balancing loss of OtherLoss's experts is not added: it would differ by" in caplog.text
