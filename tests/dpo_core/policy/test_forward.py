"""Tests the ways to run a model on a batch, against plain forward passes."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Llama4TextConfig,
    LlamaForCausalLM,
    PretrainedConfig,
)

from dpo_core.encoding.encode import EncodedGroup
from dpo_core.policy.batch import collate
from dpo_core.policy.forward import Logits, packed_rewards, plain_rewards, readings
from dpo_core.policy.measures import Measures
from dpo_core.policy.scorer import Scorer
from tests.dpo_core.models.test_model import SIZES, assert_same_as_plain


@pytest.mark.parametrize("takes_batches", [True, False])
def test_tokens_of_others_are_read_and_not_learned(policy, plain_token_logps, takes_batches):
    groups = [
        EncodedGroup([5, 6, 7], ([8, 9, 10, 11, 12], [13, 14]), None, 1, others=(((1, 3),), ())),
        EncodedGroup([5], ([8], [9, 10, 11, 12]), None, 2, others=((), ((1, 2), (3, 4)))),
        EncodedGroup([7, 8], ([9, 10], [11]), None, 3),
    ]
    scorer = Scorer(policy if takes_batches else Doubled(policy.config).eval())
    assert scorer.takes_batches == takes_batches
    batch = scorer.collate(groups)
    assert batch.num_completion_tokens.tolist() == [3, 2, 1, 2, 2, 1]
    plain = [logps for group in groups for logps in plain_token_logps(scorer.model, group)]
    learned = [group.learned(j) for group in groups for j in range(len(group.completion_ids))]
    expected = [logps[list(places)] for logps, places in zip(plain, learned, strict=True)]
    torch.testing.assert_close(scorer.token_logps(batch)[0], torch.cat(expected), rtol=1e-5, atol=1e-5)
    found = scorer(batch)
    torch.testing.assert_close(found[:, 0], torch.stack([e.sum() for e in expected]), rtol=1e-5, atol=1e-5)
    shortest = [2, 2, 1, 1, 1, 1]
    heads = torch.stack([e[:n].sum() for e, n in zip(expected, shortest, strict=True)])
    torch.testing.assert_close(found[:, 1], heads, rtol=1e-5, atol=1e-5)
    assert Measures(groups, found).all.lengths.tolist() == [3, 2, 1, 2, 2, 1]


class Doubled(LlamaForCausalLM):
    """A Llama whose logits are twice what its head makes of the last hidden state."""

    def forward(self, **inputs):
        found = super().forward(**inputs)
        found.logits = 2 * found.logits
        return found


def test_a_model_with_an_unknown_head_runs_by_its_own_forward_and_agrees(policy, pairs, plain_token_logps, caplog):
    doubled = Doubled(policy.config).eval()
    scorer = Scorer(doubled)
    assert not scorer.takes_batches
    assert "Doubled cannot compute a prompt once for several completions" in caplog.text
    assert "one row at a time" in caplog.text
    logps, _ = scorer.token_logps(scorer.collate(pairs))
    assert_same_as_plain(doubled, pairs, logps, plain_token_logps)


def test_a_decoder_that_transformers_does_not_name_is_found(pairs, plain_token_logps):
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(
        Llama4TextConfig(
            **SIZES | {"num_hidden_layers": 4},
            intermediate_size_mlp=64,
            num_local_experts=2,
            attention_chunk_size=8,
            floor_scale=4,
        )
    ).eval()
    scorer = Scorer(policy)
    assert scorer.takes_batches
    logps, _ = scorer.token_logps(scorer.collate(pairs))
    assert_same_as_plain(policy, pairs, logps, plain_token_logps)


def test_scales_of_positions_in_the_stream_are_not_shared(pairs, plain_token_logps):
    torch.manual_seed(0)
    full = ["full_attention"] * 2
    config = Llama4TextConfig(
        **SIZES, intermediate_size_mlp=64, num_local_experts=2, layer_types=full, floor_scale=8192
    )
    config.no_rope_layers = [1, 0]
    assert not Scorer(AutoModelForCausalLM.from_config(config).eval()).shares_prompts


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [Logits()]),
        ({"logit_scale": 0.5}, [Logits(0.5), Logits()]),
        ({"logits_scaling": 4.0}, [Logits(0.25), Logits(4.0), Logits()]),
        ({"final_logit_softcapping": 30.0}, [Logits(cap=30.0), Logits()]),
        ({"logit_scale": "inv_sqrt_d_model", "logits_scaling": 0}, [Logits()]),
        (
            {"lm_head_multiplier": 2.0, "logits_soft_cap": 9},
            [Logits(2.0, 9.0), Logits(2.0), Logits(cap=9.0), Logits()],
        ),
    ],
)
def test_factors_and_caps_of_logits_have_every_meaning_the_likeliest_first(config, expected):
    assert readings(PretrainedConfig(**config)) == expected


def test_rewards_are_read_at_the_last_token_whichever_way_a_batch_runs(make_policy, pairs):
    policy = make_policy(0)
    policy.score = torch.nn.Linear(policy.config.hidden_size, 2)
    with torch.no_grad():
        shared = packed_rewards(policy, collate(pairs, share_prompts=True, with_ends=True), shared=True)
        apart = collate(pairs, share_prompts=False, with_ends=True)
        padded, plain = packed_rewards(policy, apart, shared=False), plain_rewards(policy, apart)
        group = pairs[0]
        last = policy.model(torch.tensor([[*group.prompt_ids, *group.completion_ids[1]]])).last_hidden_state[0, -1]
        expected = policy.score(last)
    assert shared.shape == (sum(len(group.completion_ids) for group in pairs), 2)
    torch.testing.assert_close(shared, plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(padded, plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(plain[1], expected, atol=1e-5, rtol=1e-4)
