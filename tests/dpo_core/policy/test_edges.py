"""Tests groups that just fit into a pack (the rows of one forward pass), and groups that just do not.

One step of `train` must equal a plain forward pass of each full sequence, or the group must be refused by name.
"""

import pytest
import torch

from dpo_core import options as o
from dpo_core.config import Optim, TrainConfig
from dpo_core.encoding.encode import EncodedGroup
from dpo_core.training.trainer import train

BETA = 0.5
ORDINARY = EncodedGroup([7, 8, 9], ([10, 11], [12, 13, 14]), None, 9)


def first_step(groups, policy, tokenizer, folder, objective=None, **options):
    """Returns the loss and the gradient, before any clipping, of the first step."""
    gradient = {}

    def keep(parameter):
        gradient[parameter] = parameter.grad.flatten().clone()

    for parameter in policy.parameters():
        parameter.register_post_accumulate_grad_hook(keep)
    config = TrainConfig(
        objective=objective or o.Dpo(beta=BETA),
        optim=Optim(learning_rate=1e-3),
        batch_size=len(groups),
        n_epochs=1,
        checkpoint_steps=2,
        **options,
    )
    result = next(train(config, policy, tokenizer, [groups] * 2, total_steps=2, checkpoint_dir=folder))
    return result.metrics["loss"], torch.cat([gradient[parameter] for parameter in policy.parameters()])


def assert_same_step(found, policy, expected):
    """Asserts that loss and gradient are as expected: to 1e-5 in the loss, and to 1e-4 relative in the gradient."""
    loss, gradient = found
    assert loss == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    plain = torch.cat([part.flatten() for part in torch.autograd.grad(expected, list(policy.parameters()))])
    assert ((gradient - plain).norm() / plain.norm()).item() < 1e-4


def plackett_luce(group, logps):
    """Returns the Plackett-Luce loss (arXiv 2305.18290, A.3) of completions in order, the best first."""
    rewards = BETA * (torch.stack(logps) - torch.tensor(group.ref_logps))
    return sum(rewards[place:].logsumexp(0) - rewards[place] for place in range(len(rewards)))


EDGES = {
    "completions that share their first half": EncodedGroup([5, 6], ([20, 21, 22, 23], [20, 21, 24, 25]), None, 1),
    "a completion that the other one continues": EncodedGroup([5, 6], ([20, 21], [20, 21, 22]), None, 1),
    "completions of one token": EncodedGroup([5, 6], ([20], [21]), None, 1),
    "a prompt of one token": EncodedGroup([5], ([20, 21, 22], [23]), None, 1),
    "one token each": EncodedGroup([5], ([20], [21]), None, 1),
    "a completion of the prompt's own ids": EncodedGroup([5, 6, 7], ([5, 6, 7], [7, 6, 5]), None, 1),
    "sixteen completions": EncodedGroup([5, 6], tuple([20 + i] * (1 + i % 5) for i in range(16)), None, 1),
    "a completion that fills a pack": EncodedGroup([5, 6], (list(range(20, 60)), [60, 61]), None, 1),
    "a prompt that fills a pack": EncodedGroup(list(range(20, 60)), ([60], [61, 62]), None, 1),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("max_tokens_per_pack", [None, 8192], ids=["alone", "packed"])
def test_a_step_is_that_of_plain_forwards(
    edge, max_tokens_per_pack, make_policy, tokenizer, scored, plain_token_logps, tmp_path
):
    groups = scored([ORDINARY, EDGES[edge], ORDINARY], make_policy(1))
    policy, plain = make_policy(), make_policy()
    losses = [plackett_luce(group, [logps.sum() for logps in plain_token_logps(plain, group)]) for group in groups]
    longest = max(16, *(len(group.prompt_ids) + max(map(len, group.completion_ids)) for group in groups))
    options = {"max_length": longest, "max_tokens_per_pack": max_tokens_per_pack or longest}
    found = first_step(groups, policy, tokenizer, tmp_path, **options)
    assert_same_step(found, plain, torch.stack(losses).mean())


@pytest.mark.parametrize("prompt_ids", [[5], [5, 6, 7]], ids=["a prompt of one token", "a prompt of three"])
@pytest.mark.parametrize("completion_ids", [[20], [20, 21, 22]], ids=["one token", "three tokens"])
def test_a_group_of_one_is_learned_by_its_tokens(
    prompt_ids, completion_ids, make_policy, tokenizer, plain_token_logps, tmp_path
):
    groups = [EncodedGroup(prompt_ids, (completion_ids,), None, 1), EncodedGroup([8, 9], ([10, 11],), None, 2)]
    policy, plain = make_policy(), make_policy()
    token_logps = torch.cat([plain_token_logps(plain, group)[0] for group in groups])
    found = first_step(groups, policy, tokenizer, tmp_path, o.Supervised())
    assert_same_step(found, plain, -token_logps.mean())


EMPTY = {
    "the first completion": ([5, 6], ([], [20, 21])),
    "the last completion": ([5, 6], ([20, 21], [])),
    "every completion": ([5, 6], ([], [])),
    "the prompt": ([], ([20, 21], [22])),
    "the group": ([5, 6], ()),
}


@pytest.mark.parametrize("empty", EMPTY)
def test_a_prompt_or_completion_without_tokens_is_refused_by_line(empty):
    with pytest.raises(ValueError, match=r"Line 7 .*without tokens"):
        EncodedGroup(*EMPTY[empty], None, 7)


@pytest.mark.parametrize("name", ["ref_logps", "ref_head_logps", "ratings"])
def test_a_completion_without_its_figure_is_refused_by_line(name):
    with pytest.raises(ValueError, match=f"Line 7 has 1 {name} for 2 completions"):
        EncodedGroup([5], ([6], [7]), line=7, **{"ref_logps": None, name: (0.5,)})
