"""Tests the log-probabilities of completions, and the scores of a reference."""

import pytest
import torch

from dpo_core.policy.scorer import Scorer, score_reference


def test_order_within_a_pack_changes_nothing(policy, pairs):
    scorer = Scorer(policy)
    forwards, _ = scorer.token_logps(scorer.collate(pairs))
    backwards, _ = scorer.token_logps(scorer.collate(pairs[::-1]))
    sizes = [sum(map(len, group.completion_ids)) for group in pairs]
    reordered = torch.cat(backwards.split(sizes[::-1])[::-1])
    torch.testing.assert_close(forwards, reordered, rtol=1e-5, atol=1e-5)


def test_a_target_that_is_the_likeliest_token_counts_as_correct(policy, demonstrations):
    scorer = Scorer(policy)
    group = demonstrations[1]
    ids = torch.tensor([[*group.prompt_ids, *group.completion_ids[0]]])
    likeliest = policy(input_ids=ids).logits[0, len(group.prompt_ids) - 1 : -1].argmax(-1)
    _, correct = scorer.token_logps(scorer.collate([group]))
    assert correct.tolist() == (likeliest == torch.tensor(group.completion_ids[0])).tolist()


@pytest.mark.parametrize("budget", [1, 60, 8192])
def test_the_reference_gives_sums_and_those_of_heads_in_the_order_of_the_groups(
    policy, make_groups, plain_token_logps, budget
):
    groups = make_groups(5, 3)
    found = score_reference(policy, groups, max_tokens_per_pack=budget)
    for group, scored in zip(groups, found, strict=True):
        plain = plain_token_logps(policy, group)
        assert scored.ref_logps == pytest.approx([logps.sum().item() for logps in plain], rel=1e-5, abs=1e-4)
        heads = [logps[: group.head_length].sum().item() for logps in plain]
        assert scored.ref_head_logps == pytest.approx(heads, rel=1e-5, abs=1e-4)


def test_no_caller_can_change_the_plan_that_another_one_gets(policy, pairs):
    scorer = Scorer(policy)
    plans = [scorer.plan(pairs, num_ranks=2, max_tokens_per_pack=60) for _ in range(2)]
    assert plans[0] == plans[1]
    assert hash(plans[0])  # of a list, there is none
