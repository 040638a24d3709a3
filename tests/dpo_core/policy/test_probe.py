"""Tests how a small copy of a model, in float32, decides what may be shared between completions of one prompt.

In this copy, attention windows and similar limits take effect.
"""

import random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    FalconH1Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MiniCPM3Config,
    Ministral3Config,
    MptConfig,
    MuseGlimmerConfig,
    MuseGlimmerForConditionalGeneration,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    RecurrentGemmaConfig,
)

from dpo_core.encoding.encode import EncodedGroup
from dpo_core.policy.scorer import Scorer
from tests.dpo_core import conftest

SIZES = conftest.SIZES | {"initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


def build(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def ids(length: int) -> list[int]:
    rng = random.Random(length)
    return [rng.randrange(5, conftest.VOCABULARY) for _ in range(length)]


LONG = EncodedGroup(ids(80), (ids(40), ids(50)), None, 1)


def assert_agrees(policy, plain_token_logps, group=LONG) -> Scorer:
    scorer = Scorer(policy)
    with torch.no_grad():
        found, _ = scorer.token_logps(scorer.collate([group]))
        torch.testing.assert_close(found, torch.cat(plain_token_logps(policy, group)), rtol=1e-4, atol=1e-4)
    return scorer


@pytest.mark.parametrize(
    "config",
    [
        PhimoeConfig(**SIZES | EXPERTS, sliding_window=32),
        Qwen2MoeConfig(**SIZES | EXPERTS, use_sliding_window=True, sliding_window=32, max_window_layers=1),
    ],
    ids=lambda config: config.model_type,
)
def test_a_window_that_is_in_the_mask_alone_is_not_ignored(config, plain_token_logps):
    assert not assert_agrees(build(config), plain_token_logps).shares_prompts


def test_a_window_that_attention_is_given_is_shared_beyond(plain_token_logps):
    config = Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=32, max_window_layers=1)
    assert assert_agrees(build(config), plain_token_logps).shares_prompts


def test_a_scale_that_grows_with_the_position_is_shared(plain_token_logps):
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 30,
        "llama_4_scaling_beta": 0.5,
    }
    assert assert_agrees(build(Ministral3Config(**SIZES, rope_parameters=rope)), plain_token_logps).shares_prompts


@pytest.mark.parametrize(
    "config",
    [
        CohereConfig(**SIZES, logit_scale=0.25),
        GraniteConfig(**SIZES, logits_scaling=4.0),
        HyperCLOVAXConfig(**SIZES, logits_scaling=0.25),
        MiniCPM3Config(**SIZES | {"num_key_value_heads": 4}, dim_model_base=8, q_lora_rank=16, kv_lora_rank=16),
    ],
    ids=lambda config: config.model_type,
)
def test_scales_of_logits_are_read_under_every_name(config, plain_token_logps):
    assert assert_agrees(build(config), plain_token_logps).shares_prompts


def test_a_scale_before_a_cap_is_read_in_a_multimodal_model(plain_token_logps):
    layers = {"layer_types": ["full_attention"]}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2} | layers
    text = SIZES | {"num_hidden_layers": 1, "output_multiplier": 0.25, "final_logit_softcapping": 5.0} | layers
    torch.manual_seed(0)
    policy = MuseGlimmerForConditionalGeneration(MuseGlimmerConfig(text_config=text, vision_config=vision)).eval()
    assert assert_agrees(policy, plain_token_logps).shares_prompts


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, logits_scaling=4.0),
        LlamaConfig(**SIZES, logit_scale=0.5, final_logit_softcapping=3.0),
        MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=conftest.VOCABULARY, logit_scale="inv_sqrt_d_model"),
    ],
    ids=["divides", "multiplies and caps", "a word"],
)
def test_a_factor_of_logits_that_the_class_does_not_read_changes_nothing(config, plain_token_logps):
    assert assert_agrees(build(config), plain_token_logps).takes_batches


def test_the_scale_of_a_model_with_a_state_is_read_too(plain_token_logps):
    mamba = {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
    policy = build(FalconH1Config(**SIZES, **mamba, lm_head_multiplier=0.25))
    assert assert_agrees(policy, plain_token_logps).takes_batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recurrent_blocks_share_nothing_in_any_dtype(dtype):
    config = RecurrentGemmaConfig(**SIZES | {"num_hidden_layers": 3}, lru_width=32)
    assert not Scorer(build(config).to(dtype)).shares_prompts


class Scaled(LlamaForCausalLM):
    """A Llama whose logits are 1.05 times what its head makes of the last hidden state."""

    def forward(self, **inputs):
        found = super().forward(**inputs)
        found.logits = 1.05 * found.logits
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_small_unknown_scale_is_noticed_in_any_dtype(dtype, make_policy):
    policy = Scaled(make_policy(initializer_range=0.02).config).eval().to(dtype)
    assert not Scorer(policy).takes_batches


def test_a_vocabulary_may_be_smaller_than_the_example(make_policy):
    assert Scorer(make_policy(vocab_size=6, pad_token_id=None, bos_token_id=0, eos_token_id=1)).shares_prompts


class Oddity(LlamaForCausalLM):
    """A Llama whose class cannot be instantiated a second time."""

    made = 0

    def __init__(self, config):
        type(self).made += 1
        if type(self).made > 1:
            raise TypeError("there is one of me")
        super().__init__(config)


def test_a_model_without_a_miniature_shares_nothing_and_agrees(make_policy, plain_token_logps, caplog):
    scorer = assert_agrees(Oddity(make_policy().config).eval(), plain_token_logps)
    assert not scorer.shares_prompts
    assert scorer.takes_batches
    assert "no small copy of it can be made to try this, TypeError: there is one of me" in caplog.text


def test_a_model_without_a_miniature_is_not_trusted_in_half_precision(make_policy, monkeypatch):
    monkeypatch.setattr(Oddity, "made", 0)
    scorer = Scorer(Oddity(make_policy().config).eval().bfloat16())
    assert scorer.manner.no_batches == "its numbers in torch.bfloat16 are too coarse to compare"


def test_a_model_that_sees_the_tokens_it_is_to_predict_is_refused():
    policy = build(BertConfig(**SIZES))
    with pytest.raises(ValueError, match="BertLMHeadModel sees later tokens while it predicts earlier ones"):
        Scorer(policy)


def test_the_same_model_is_taken_as_a_decoder(plain_token_logps):
    assert_agrees(build(BertConfig(**SIZES, is_decoder=True)), plain_token_logps)
