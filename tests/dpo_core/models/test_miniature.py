"""Tests that a small copy of a model is small, has its kinds of layers, and changes nothing else."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dpo_core.models.miniature import miniature
from tests.dpo_core.conftest import SIZES


def test_a_miniature_is_small_and_leaves_the_model_and_the_random_numbers_alone(make_policy):
    policy = make_policy(num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, hidden_size=64).bfloat16()
    state = torch.get_rng_state()
    small = miniature(policy, narrow=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert policy.config.num_hidden_layers == 6
    assert (small.config.num_hidden_layers, small.config.num_attention_heads, small.config.hidden_size) == (2, 4, 32)
    assert small.dtype == torch.float32
    assert all(isinstance(module, nn.Module) for module in small.model.layers)


def test_a_miniature_has_a_layer_of_each_kind():
    window = {"use_sliding_window": True, "sliding_window": 32}
    types = ["sliding_attention"] * 3 + ["full_attention"]
    policy = Qwen3ForCausalLM(Qwen3Config(**SIZES | {"num_hidden_layers": 4}, layer_types=types, **window))
    small = miniature(policy, narrow=True)
    assert small.config.layer_types == ["sliding_attention", "full_attention"]
    assert small.config.sliding_window == 4


@pytest.mark.parametrize(
    "family", ["llama", "qwen3_moe", "deepseek_v3", "gemma3_text", "gpt_oss", "gpt2", "llama4_text"]
)
def test_a_miniature_of_a_model_of_real_size_is_small(family):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family))
        small = miniature(model, narrow=True)
    assert sum(parameter.numel() for parameter in model.parameters()) > 1e8
    assert sum(parameter.numel() for parameter in small.parameters()) < 1e8
