"""What is stepped, what stays as it is, and into how many parts it is split."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma3Config

from dpo_core import ranks, weights
from dpo_core.config import Optim, TrainConfig
from dpo_core.trainer import train

DECAYING = TrainConfig(
    optim=Optim(learning_rate=1e-2, weight_decay=0.1), batch_size=8, n_epochs=1, checkpoint_steps=2, max_length=64
)
TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip


def model_with_a_tower(sizes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Gemma3Config(text_config=sizes, vision_config=TOWER)).eval()


def of_the_tower(policy):
    return {name: p.detach().clone() for name, p in policy.named_parameters() if "vision" in name}


def test_weights_that_no_gradient_reaches_stay_as_they_are_and_have_no_moments(
    sizes, tokenizer, pairs, scored, tmp_path
):
    policy = model_with_a_tower(sizes)
    before = of_the_tower(policy)
    list(train(DECAYING, policy, tokenizer, [scored(pairs, policy)] * 4, total_steps=4, checkpoint_dir=tmp_path))
    assert before
    torch.testing.assert_close(of_the_tower(policy), before, rtol=0, atol=0)
    state = load_file(tmp_path / "step-000004" / "optimizer-00001-of-00001.safetensors")
    assert {state[key].item() for key in state if key.endswith(".step") and "vision" in key} == {0}
    assert not [key for key in state if key.endswith("exp_avg") and "vision" in key]
    assert [key for key in state if key.endswith("exp_avg") and "vision" not in key]


def test_a_weight_that_the_first_step_did_not_reach_goes_on_bit_for_bit(make_policy, tokenizer, pairs, tmp_path):
    """AdamW counts the steps of each weight by itself."""
    config, policy = replace(DECAYING, checkpoint_steps=1), make_policy()
    forgotten = policy.lm_head.weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    steps = train(config, policy, tokenizer, [pairs] * 3, total_steps=3, checkpoint_dir=tmp_path / "straight")
    next(steps)
    forgotten.remove()
    list(steps)
    saved, resumed = tmp_path / "straight" / "step-000001", make_policy(7)
    list(train(config, resumed, tokenizer, [pairs] * 3, total_steps=3, checkpoint_dir=tmp_path / "again", resume=saved))
    torch.testing.assert_close(dict(resumed.named_parameters()), dict(policy.named_parameters()), rtol=0, atol=0)
    state = load_file(tmp_path / "again" / "step-000003" / "optimizer-00001-of-00001.safetensors")
    assert (state["lm_head.weight.step"], state["model.norm.weight.step"]) == (2, 3)


@pytest.mark.parametrize(
    ("sharding", "local_ranks", "num_shards"),
    [("auto", 4, 4), ("auto", 1, 8), ("hybrid", 4, 4), ("hybrid", 1, 1), ("full", 4, 8), ("replicated", 4, 1)],
)
def test_weights_on_gpus_are_split_within_a_node_or_over_nodes_of_one_rank(
    sharding, local_ranks, num_shards, monkeypatch
):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
    monkeypatch.setattr(weights, "num_ranks", lambda: 8)
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    assert weights.num_shards(on_gpu, sharding) == num_shards


def test_messages_of_several_dtypes_go_out_in_the_order_of_the_tensors(monkeypatch):
    sent = []
    monkeypatch.setattr(ranks, "num_ranks", lambda: 2)
    monkeypatch.setattr(ranks.dist, "all_reduce", lambda tensor: sent.append(tensor.dtype))
    dtypes = [torch.float64, torch.bfloat16, torch.int64, torch.float32, torch.float16, torch.int32, torch.bfloat16]
    ranks.add_up(*(torch.ones(2, dtype=dtype) for dtype in dtypes))
    assert sent == dtypes[:-1]
