"""Low-rank adapters: the base is the reference, and stays as it is."""

from dataclasses import replace

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from dpo_core.config import Lora, Optim, TrainConfig
from dpo_core.model import load_policy, merge_adapter
from dpo_core.options import InvalidOption
from dpo_core.scorer import score_reference
from dpo_core.trainer import train

CONFIG = TrainConfig(optim=Optim(learning_rate=1e-2), batch_size=8, n_epochs=1, max_length=64, checkpoint_steps=2)
ADAPTERS = {
    "lora": Lora(r=4),
    "rslora": Lora(r=4, use_rslora=True),
    "dora": Lora(r=4, use_dora=True),
    "of two modules": Lora(target_modules=("q_proj", "v_proj")),
}


@pytest.fixture
def base(make_policy, tokenizer, tmp_path):
    folder = tmp_path / "base"
    make_policy(tie_word_embeddings=True).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train_adapter(base, tokenizer, pairs, folder, adapter, config=CONFIG, **kwargs):
    torch.manual_seed(0)
    policy = load_policy(base, adapter=adapter)
    batches = [pairs] * kwargs.pop("last_step", 4)
    steps = list(train(config, policy, tokenizer, batches, total_steps=4, checkpoint_dir=folder, **kwargs))
    return policy, steps


@pytest.mark.parametrize("name", ADAPTERS)
def test_only_the_adapter_learns_and_its_base_is_the_reference(name, base, tokenizer, pairs, tmp_path):
    policy = load_policy(base, adapter=ADAPTERS[name])
    groups = score_reference(policy, pairs, max_tokens_per_pack=8192)
    plain = load_policy(base)
    policy, steps = train_adapter(base, tokenizer, groups, tmp_path / "run", ADAPTERS[name])
    assert steps[0].metrics["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert steps[-1].metrics["loss"] < steps[0].metrics["loss"]
    after = score_reference(policy, pairs, max_tokens_per_pack=8192)  # the adapter is off
    assert [g.ref_logps for g in after] == [g.ref_logps for g in groups]
    weights = dict(policy.named_parameters())
    for key, parameter in plain.named_parameters():
        names = (key, key.replace(".weight", ".base_layer.weight"))
        assert torch.equal(next(weights[name] for name in names if name in weights), parameter)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_checkpoint_holds_the_adapter_and_merges_into_a_model(name, base, tokenizer, pairs, tmp_path):
    policy, _ = train_adapter(base, tokenizer, pairs, tmp_path / "run", ADAPTERS[name])
    adapter = tmp_path / "run" / "step-000004" / "model"
    assert (adapter / "adapter_model.safetensors").stat().st_size < (base / "model.safetensors").stat().st_size
    ids = torch.tensor([pairs[3].prompt_ids])
    expected = policy(input_ids=ids).logits
    torch.testing.assert_close(AutoPeftModelForCausalLM.from_pretrained(adapter)(input_ids=ids).logits, expected)
    merge_adapter(adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any("lora" in key for key, _ in merged.named_parameters())
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ADAPTERS)
def test_resuming_an_adapter_repeats_the_run_bit_for_bit(name, base, tokenizer, pairs, tmp_path):
    straight, steps = train_adapter(base, tokenizer, pairs, tmp_path / "run", ADAPTERS[name])
    resumed, rest = train_adapter(
        base,
        tokenizer,
        pairs,
        tmp_path / "again",
        ADAPTERS[name],
        resume=tmp_path / "run" / "step-000002",
    )
    assert [step.metrics["loss"] for step in rest] == [step.metrics["loss"] for step in steps[2:]]
    for (name, ours), (_, theirs) in zip(resumed.named_parameters(), straight.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_activations_computed_again_change_nothing(base, tokenizer, pairs, tmp_path):
    kept, _ = train_adapter(base, tokenizer, pairs, tmp_path / "kept", Lora())
    config = replace(CONFIG, activation_checkpointing="on")
    again, _ = train_adapter(base, tokenizer, pairs, tmp_path / "again", Lora(), config)
    torch.testing.assert_close(dict(again.named_parameters()), dict(kept.named_parameters()))


def test_modules_that_the_model_lacks_are_refused(base):
    with pytest.raises(InvalidOption, match="w_query") as refused:
        load_policy(base, adapter=Lora(target_modules=("w_query",)))
    assert refused.value.field == "target_modules"


@pytest.mark.parametrize(("field", "value"), [("r", 0), ("lora_alpha", 0.0), ("target_modules", ())])
def test_options_beyond_their_limits_are_refused(field, value):
    with pytest.raises(InvalidOption, match=field):
        Lora(**{field: value})
