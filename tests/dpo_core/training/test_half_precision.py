"""Tests training of bfloat16 weights with float32 masters."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_core.config import Lora, Optim, TrainConfig
from dpo_core.models.model import load_policy
from dpo_core.policy.scorer import score_reference
from dpo_core.training.optim import make_optimizer
from dpo_core.training.trainer import train
from dpo_core.training.weights import Weights

CONFIG = TrainConfig(
    optim=Optim(learning_rate=1e-3, warmup_ratio=0.0, schedule="constant"), batch_size=8, n_epochs=1, checkpoint_steps=2
)


@pytest.fixture
def model(policy, tokenizer, tmp_path):
    policy.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(model, tokenizer, batches, folder, *, dtype=torch.bfloat16, **kwargs):
    policy = load_policy(model, dtype=dtype)
    return policy, list(train(CONFIG, policy, tokenizer, batches, total_steps=4, checkpoint_dir=folder, **kwargs))


def test_updates_too_small_for_bfloat16_add_up_in_the_masters(policy):
    half = policy.to(torch.bfloat16)
    before = half.lm_head.weight.detach().clone()
    weights = Weights(half)
    optimizer = make_optimizer(weights.stepped.values(), Optim())
    optimizer.param_groups[0]["lr"] = 1e-5  # bfloat16 near 0.3 has steps of 2e-3
    moved = []
    for _ in range(200):
        half.lm_head.weight.sum().backward()
        weights.collect_gradients(max_norm=1e9)
        optimizer.step()
        weights.update_policy()
        moved.append((half.lm_head.weight - before).float().mean().item())
    assert abs(moved[0]) < 1e-4
    assert moved[-1] == pytest.approx(-200e-5, rel=0.1)


def test_gradients_over_packs_add_up_in_float32(policy):
    weights = Weights(policy.to(torch.bfloat16))
    for _ in range(512):
        (policy.lm_head.weight * 2**-9).sum().backward()
    assert weights.trained["lm_head.weight"].grad.dtype == torch.float32
    assert torch.equal(weights.trained["lm_head.weight"].grad, torch.ones_like(policy.lm_head.weight).float())


@pytest.mark.slow
def test_training_in_bfloat16_follows_that_in_float32(model, tokenizer, pairs, tmp_path):
    _, half = run(model, tokenizer, [pairs] * 4, tmp_path / "half")
    _, whole = run(model, tokenizer, [pairs] * 4, tmp_path / "whole", dtype=torch.float32)
    for ours, theirs in zip(half, whole, strict=True):
        assert ours.metrics["loss"] == pytest.approx(theirs.metrics["loss"], rel=0.1)
        assert ours.metrics["grad_norm"] == pytest.approx(theirs.metrics["grad_norm"], rel=0.2)


def test_a_policy_equal_to_its_reference_has_loss_ln_2(model, tokenizer, pairs, tmp_path):
    groups = score_reference(load_policy(model, dtype=torch.bfloat16), pairs, max_tokens_per_pack=8192)
    _, steps = run(model, tokenizer, [groups] * 4, tmp_path)
    assert steps[0].metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_resuming_repeats_the_run_bit_for_bit_and_saves_a_model_in_bfloat16(model, tokenizer, pairs, tmp_path):
    straight, steps = run(model, tokenizer, [pairs] * 4, tmp_path / "straight")
    saved = tmp_path / "straight" / "step-000002"
    resumed, rest = run(model, tokenizer, [pairs] * 4, tmp_path / "resumed", resume=saved)
    assert [step.metrics["loss"] for step in rest] == [step.metrics["loss"] for step in steps[2:]]
    torch.testing.assert_close(dict(resumed.named_parameters()), dict(straight.named_parameters()), rtol=0, atol=0)
    name = "optimizer-00001-of-00001.safetensors"
    last = tmp_path / "straight" / "step-000004"
    assert (tmp_path / "resumed" / last.name / name).read_bytes() == (last / name).read_bytes()
    assert AutoModelForCausalLM.from_pretrained(last / "model").dtype == torch.bfloat16


@pytest.mark.parametrize("saved_in", [torch.bfloat16, torch.float32], ids=str)
def test_resuming_in_another_precision_is_refused(saved_in, model, tokenizer, pairs, tmp_path):
    (other,) = {torch.bfloat16, torch.float32} - {saved_in}
    run(model, tokenizer, [pairs] * 4, tmp_path, dtype=saved_in)
    with pytest.raises(ValueError, match=f"was trained in {str(saved_in)[6:]}, but the policy is in"):
        run(model, tokenizer, [pairs] * 4, tmp_path, dtype=other, resume=tmp_path / "step-000002")


def test_a_policy_in_float16_is_refused(model, tokenizer, pairs, tmp_path):
    with pytest.raises(ValueError, match="'float16', in which small gradients become 0"):
        run(model, tokenizer, [pairs] * 4, tmp_path, dtype=torch.float16)


def test_float64_is_stepped_in_float64(policy):
    weights = Weights(policy.double())
    assert not weights.masters
    assert {parameter.dtype for parameter in weights.stepped.values()} == {torch.float64}


def test_an_adapter_on_a_base_in_bfloat16_learns(model, tokenizer, pairs, tmp_path):
    policy = load_policy(model, dtype=torch.bfloat16, adapter=Lora(r=4))
    steps = list(train(CONFIG, policy, tokenizer, [pairs] * 4, total_steps=4, checkpoint_dir=tmp_path))
    assert steps[-1].metrics["loss"] < steps[0].metrics["loss"]
