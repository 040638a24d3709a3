"""Tests that a step's gradient is that of the whole loss, however its groups are cut into packs.

A pack is the groups that one forward pass computes together. The oracle is autograd on transformers' own forward.
"""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid

from dpo_core.config import Lora
from dpo_core.models.adapter import dropouts
from dpo_core.models.model import load_policy
from dpo_core.objectives.losses import Statistics
from dpo_core.options import Aot, Dpo
from dpo_core.policy.scorer import Scorer
from dpo_core.training.gradients import backward, make_packs, share_of_loss
from dpo_core.training.pack_size import checkpoint_activations
from tests.dpo_core.policy.test_routing import own_loss

DPO, AOT = Dpo(beta=0.5), Aot(beta=0.5)
WEIGHTS = (1.0, 2.0, 0.5, 1.0, 1.0, 3.0, 1.0, 1.0)


@pytest.fixture
def groups(pairs):
    return [replace(pair, weight=weight) for pair, weight in zip(pairs, WEIGHTS, strict=True)]


def whole_loss(policy, groups, plain_token_logps) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns DPO's loss, a mean over the groups, and the log-probabilities of all completions."""
    logps = torch.stack([logps.sum() for group in groups for logps in plain_token_logps(policy, group)]).view(-1, 2)
    logratios = logps - torch.tensor([group.ref_logps for group in groups])
    losses = -logsigmoid(DPO.beta * (logratios[:, 0] - logratios[:, 1]))
    return (losses * torch.tensor(WEIGHTS)).mean(), logps.detach().flatten()


@pytest.mark.parametrize("tokens", [40, 90, 8192], ids=["many packs", "some packs", "one pack"])
def test_packs_together_have_the_gradient_of_the_whole_loss(tokens, policy, groups, plain_token_logps):
    scorer = Scorer(policy)
    packs = make_packs(scorer, groups, max_tokens_per_pack=tokens)
    assert (len(packs) == 1) == (tokens == 8192)
    assert sorted(place for pack in packs for place in pack.places) == list(range(2 * len(groups)))
    measures, loss = backward(DPO, scorer, groups, packs, Statistics())
    ours = {name: p.grad for name, p in policy.named_parameters()}
    policy.zero_grad()
    expected, logps = whole_loss(policy, groups, plain_token_logps)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(measures.all.logps, logps, rtol=1e-4, atol=1e-3)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-3, msg=name)


def test_a_loss_over_the_whole_batch_does_not_depend_on_packs(policy, groups):
    scorer, found = Scorer(policy), []
    for tokens in (40, 8192):
        policy.zero_grad()
        packs = make_packs(scorer, groups, max_tokens_per_pack=tokens)
        measures, loss = backward(AOT, scorer, groups, packs, Statistics())
        found.append((loss, measures.table, [p.grad.clone() for p in policy.parameters()]))
        torch.testing.assert_close(loss, share_of_loss(AOT, measures, groups, Statistics()))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("tokens", "shared", "adapter", "recomputed"),
    [
        (40, True, None, False),
        (90, False, None, False),
        (90, True, None, True),
        (8192, True, None, True),
        (40, True, Lora(r=4), True),
        (8192, False, Lora(r=4), False),
    ],
)
def test_experts_are_balanced_over_the_whole_batch(
    tokens, shared, adapter, recomputed, make_mixture, groups, plain_token_logps, tmp_path
):
    """The oracle is transformers' loss of one batch that holds all completions with their prompts. An adapter leaves
    the routers frozen, and the loss reaches it through what the routers read."""
    make_mixture("qwen3_moe", router_aux_loss_coef=10.0).save_pretrained(tmp_path)
    policy = load_policy(tmp_path, adapter=adapter)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    scorer = Scorer(policy, balances=True)
    assert scorer.shares_prompts
    scorer.shares_prompts = shared
    packs = make_packs(scorer, groups, max_tokens_per_pack=tokens)
    assert (len(packs) == 1) == (tokens == 8192)
    undo = checkpoint_activations(scorer) if recomputed else lambda: None
    _, loss = backward(DPO, scorer, groups, packs, Statistics())
    undo()
    ours = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    without, _ = whole_loss(policy, groups, plain_token_logps)
    (without + 10 * own_loss(policy, groups)).backward()
    torch.testing.assert_close(loss, without.detach(), rtol=1e-4, atol=1e-4)
    theirs = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert any("router" in name or name.endswith("mlp.gate.weight") for name in ours) == (adapter is None)


def test_gradients_are_added_to_those_that_are_there(policy, groups):
    scorer = Scorer(policy)
    packs = make_packs(scorer, groups, max_tokens_per_pack=8192)
    backward(DPO, scorer, groups, packs, Statistics())
    once = policy.lm_head.weight.grad.clone()
    backward(DPO, scorer, groups, packs, Statistics())
    torch.testing.assert_close(policy.lm_head.weight.grad, 2 * once)


def test_an_adapters_dropout_is_on_only_in_the_step_and_drawn_from_the_packs_seed(policy, groups, tmp_path):
    policy.save_pretrained(tmp_path)
    adapted = load_policy(tmp_path, adapter=Lora(r=4, dropout=0.5))
    with torch.no_grad():  # a new adapter changes nothing, whatever it drops
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    scorer, state = Scorer(adapted), torch.get_rng_state()

    def measured(seed):
        packs = make_packs(scorer, groups, max_tokens_per_pack=90, seed=seed)
        return backward(DPO, scorer, groups, packs, Statistics())[0].all.logps

    torch.testing.assert_close(measured(1), measured(1), rtol=0, atol=0)
    assert not torch.allclose(measured(1), measured(2))
    assert dropouts(adapted)
    assert not any(layer.training for layer in dropouts(adapted))
    assert torch.equal(torch.get_rng_state(), state)
