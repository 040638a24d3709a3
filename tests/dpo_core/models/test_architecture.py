"""Tests what is found out about the structure of models."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForSequenceClassification

from dpo_core.config import Lora
from dpo_core.models.architecture import (
    count_outputs,
    decoder_layers,
    device_of,
    is_reward_model,
    is_sharded,
    kind_of,
    local_part,
)
from dpo_core.models.model import load_reward_model
from tests.dpo_core.conftest import SIZES


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.12.self_attn.q_proj.weight", "model.layers.*.self_attn.q_proj.weight"),
        ("model.layers.0.mlp.experts.31.up_proj", "model.layers.*.mlp.experts.*.up_proj"),
        ("model.layers.7", "model.layers.*"),
        ("h1.conv1d.weight", "h1.conv1d.weight"),  # a number within a word is a part of the name
    ],
)
def test_equal_parts_of_layers_and_experts_have_equal_names(name, kind):
    assert kind_of(name) == kind


def test_layers_are_those_that_repeat(policy):
    assert decoder_layers(policy) == list(policy.model.layers)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4))
    assert decoder_layers(gpt2) == list(gpt2.transformer.h)


@pytest.mark.parametrize("num_outputs", [1, 2])
@pytest.mark.parametrize("adapter", [None, Lora(r=2)], ids=["whole", "adapter"])
def test_a_reward_model_is_known_by_its_head_also_under_an_adapter(num_outputs, adapter, policy, tmp_path):
    LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=num_outputs)).save_pretrained(tmp_path)
    rewards = load_reward_model(tmp_path, num_outputs=num_outputs, adapter=adapter)
    assert (count_outputs(rewards), is_reward_model(rewards)) == (num_outputs, True)
    assert (count_outputs(policy), is_reward_model(policy)) == (0, False)


def test_a_model_that_is_not_sharded_is_its_own_part(policy):
    assert not is_sharded(policy)
    assert local_part(policy.lm_head.weight) is policy.lm_head.weight
    assert device_of(policy) == torch.device("cpu")
