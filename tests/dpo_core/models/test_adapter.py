"""Tests low-rank adapters: the base model is the reference, and its weights stay unchanged."""

import json
from dataclasses import replace

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DeepseekV32Config,
    FalconH1Config,
    Gemma3Config,
    Llama4TextConfig,
    LlamaConfig,
    MixtralConfig,
    PhimoeConfig,
)

from dpo_core.config import Lora, Optim, TrainConfig
from dpo_core.models.adapter import BASE, fingerprint, has_learned
from dpo_core.models.architecture import UnusableModel
from dpo_core.models.model import fingerprint_of, load_policy, load_reward_model, merge_adapter
from dpo_core.options import InvalidOption
from dpo_core.policy.scorer import score_reference
from dpo_core.training.trainer import train
from tests.dpo_core import conftest

CONFIG = TrainConfig(optim=Optim(learning_rate=1e-2), batch_size=8, n_epochs=1, max_length=64, checkpoint_steps=2)
ADAPTERS = {
    "lora": Lora(r=4),
    "rslora": Lora(r=4, use_rslora=True),
    "dora": Lora(r=4, use_dora=True),
    "dropout": Lora(r=4, dropout=0.3),
    "of two modules": Lora(target_modules=("q_proj", "v_proj")),
}


@pytest.fixture
def base(make_policy, tokenizer, tmp_path):
    folder = tmp_path / "base"
    make_policy(tie_word_embeddings=True).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train_adapter(base, tokenizer, pairs, folder, adapter, config=CONFIG, **kwargs):
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


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_activations_change_nothing(dropout, base, tokenizer, pairs, tmp_path):
    adapter = Lora(dropout=dropout)
    kept, _ = train_adapter(base, tokenizer, pairs, tmp_path / "kept", adapter)
    config = replace(CONFIG, activation_checkpointing="on")
    again, _ = train_adapter(base, tokenizer, pairs, tmp_path / "again", adapter, config)
    torch.testing.assert_close(dict(again.named_parameters()), dict(kept.named_parameters()))


def test_dropout_acts_in_training_alone_and_as_the_seed_says(base, tokenizer, pairs, tmp_path):
    def losses(name, adapter, seed=0):
        policy, steps = train_adapter(base, tokenizer, pairs, tmp_path / name, adapter, replace(CONFIG, seed=seed))
        assert not any(module.training for module in policy.modules())
        return [step.metrics["loss"] for step in steps]

    plain, dropped = losses("plain", Lora(r=4)), losses("dropped", Lora(r=4, dropout=0.5))
    assert plain[0] == pytest.approx(dropped[0], abs=1e-6)  # the adapter adds nothing yet
    assert plain[1:] != pytest.approx(dropped[1:], abs=1e-3)
    assert losses("repeated", Lora(r=4, dropout=0.5)) == dropped
    assert losses("other", Lora(r=4, dropout=0.5), seed=1)[1:] != dropped[1:]


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_trained_adapter_is_trained_on(name, base, tokenizer, pairs, tmp_path):
    first, _ = train_adapter(base, tokenizer, pairs, tmp_path / "first", ADAPTERS[name])
    folder = tmp_path / "first" / "step-000004" / "model"
    second = load_policy(base, adapter=folder)
    theirs = dict(first.named_parameters())
    for key, parameter in second.named_parameters():
        assert torch.equal(parameter, theirs[key]), key
        assert parameter.requires_grad == theirs[key].requires_grad, key
    reference = load_policy(base, adapter=folder).requires_grad_(False)
    groups = score_reference(reference, pairs, max_tokens_per_pack=8192)
    assert groups[0].ref_logps != score_reference(second, pairs, max_tokens_per_pack=8192)[0].ref_logps
    steps = list(train(CONFIG, second, tokenizer, [groups] * 2, total_steps=2, checkpoint_dir=tmp_path / "second"))
    if not ADAPTERS[name].dropout:
        assert steps[0].metrics["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert steps[1].metrics["loss"] < steps[0].metrics["loss"]


def test_a_trained_adapter_is_put_on_no_other_base(base, make_policy, tokenizer, pairs, tmp_path):
    train_adapter(base, tokenizer, pairs, tmp_path / "run", Lora(r=4))
    make_policy(num_hidden_layers=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"The adapter in .* does not fit the model: \d+ weights"):
        load_policy(tmp_path / "other", adapter=tmp_path / "run" / "step-000004" / "model")


@pytest.mark.parametrize("load", [load_policy, load_reward_model])
def test_new_weights_are_drawn_by_the_seed_and_by_nothing_else(load, base):
    before = torch.get_rng_state()
    one, again, other = (
        {name: p for name, p in load(base, adapter=Lora(r=4), seed=seed).named_parameters() if p.requires_grad}
        for seed in (0, 0, 1)
    )
    torch.testing.assert_close(one, again, rtol=0, atol=0)
    drawn = [name for name in one if "lora_B" not in name]
    assert drawn
    assert not any(torch.equal(one[name], other[name]) for name in drawn)
    assert torch.equal(torch.get_rng_state(), before)


def test_modules_that_the_model_lacks_are_refused(base):
    with pytest.raises(InvalidOption, match="w_query") as refused:
        load_policy(base, adapter=Lora(target_modules=("w_query",)))
    assert refused.value.field == "target_modules"


def adapted(config, tokenizer, folder, adapter=None):
    """Returns a new model of this config with an adapter, and the names of the layers that the adapter changes."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    policy = load_policy(folder, adapter=adapter or Lora(r=2))
    return policy, {name.partition(".lora_B")[0] for name, _ in policy.named_parameters() if "lora_B" in name}


SIZES = conftest.SIZES | {"initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA4 = Llama4TextConfig(**SIZES, intermediate_size_mlp=64, num_local_experts=2)
PHIMOE = PhimoeConfig(**SIZES, num_local_experts=4)
MIXTRAL = MixtralConfig(**SIZES, num_local_experts=4)
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
FALCON_H1 = FalconH1Config(**SIZES, **MAMBA)
DEEPSEEK = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}


@pytest.mark.parametrize("config", [LLAMA4, PHIMOE, MIXTRAL], ids=lambda config: config.model_type)
def test_by_default_routers_are_left_out_and_adapted_layers_learn(config, tokenizer, pairs, tmp_path):
    policy, names = adapted(config, tokenizer, tmp_path / "base")
    assert not any("router" in name or name.endswith("gate") for name in names)
    assert any("experts" in name for name in names) == (config is MIXTRAL)
    list(train(CONFIG, policy, tokenizer, [pairs], total_steps=1, checkpoint_dir=tmp_path / "run"))
    assert all(weight.any() for name, weight in policy.named_parameters() if "lora_B" in name)


def test_a_saved_adapter_on_experts_is_gone_on_from(tokenizer, tmp_path):
    policy, names = adapted(MIXTRAL, tokenizer, tmp_path / "base")
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    policy.save_pretrained(tmp_path / "adapter")
    again = load_policy(tmp_path / "base", adapter=tmp_path / "adapter")
    assert {name.partition(".lora_B")[0] for name, _ in again.named_parameters() if "lora_B" in name} == names
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, policy(input_ids=ids).logits)


def test_by_default_the_towers_of_a_multimodal_model_are_left_out(tokenizer, tmp_path):
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=SIZES, vision_config=vision | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    _, names = adapted(config, tokenizer, tmp_path)
    assert len(names) == 2 * 7
    assert all("language_model" in name for name in names)


def test_by_default_mamba_blocks_have_their_first_layer_adapted(tokenizer, tmp_path):
    _, names = adapted(FALCON_H1, tokenizer, tmp_path)
    assert {name.rpartition(".")[2] for name in names if ".mamba." in name} == {"in_proj"}
    assert {"q_proj", "o_proj"} <= {name.rpartition(".")[2] for name in names}


def test_by_default_layers_that_only_choose_are_left_out(tokenizer, tmp_path):
    config = DeepseekV32Config(
        **SIZES | DEEPSEEK | {"num_key_value_heads": 4},
        first_k_dense_replace=1,
        num_experts_per_tok=2,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        index_topk=4,
    )
    _, names = adapted(config, tokenizer, tmp_path)
    assert names
    assert not any("indexer" in name for name in names)


@pytest.mark.parametrize(
    ("config", "module", "reason"),
    [
        (LlamaConfig(**SIZES), "lm_head", "names 'lm_head', the model's head, on which no adapter is trained"),
        (LLAMA4, "router", "router', a layer that texts do not pass through"),
        (FALCON_H1, "out_proj", "Module 'out_proj' is incompatible with Mamba-based models"),
        (LlamaConfig(**SIZES), "input_layernorm", "is not supported"),
    ],
    ids=["head", "router", "mamba", "norm"],
)
def test_modules_whose_adapter_would_not_learn_are_refused(config, module, reason, tokenizer, tmp_path):
    with pytest.raises(InvalidOption, match=reason) as refused:
        adapted(config, tokenizer, tmp_path, Lora(r=2, target_modules=("q_proj", module)))
    assert refused.value.field == "target_modules"


def test_a_model_that_peft_has_wrapped_is_refused(policy, pairs):
    wrapped = get_peft_model(policy, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"PeftModel, which is not a transformers model.*load_policy"):
        score_reference(wrapped, pairs, max_tokens_per_pack=64)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (
            {"num_hidden_layers": 1},
            r", because their layers differ: 14 weights, such as \S+layers\.1\.\S+ exist only in",
        ),
        (
            {"num_hidden_layers": 3},
            r", because their layers differ: 14 weights, such as \S+layers\.2\.\S+ exist only in",
        ),
        ({"hidden_size": 64}, r" \(size mismatch for .*lora_"),
    ],
    ids=["fewer layers", "more layers", "another width"],
)
def test_an_adapter_is_merged_into_no_base_but_its_own(other, reason, base, make_policy, tokenizer, tmp_path):
    load_policy(base, adapter=Lora(r=2)).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    make_policy(**other).save_pretrained(base)
    with pytest.raises(ValueError, match=rf"adapter does not fit the base {base}{reason}"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")


@pytest.fixture
def other_weights(base, make_policy):
    """Returns a function that replaces the base model by one of the same sizes with other weights."""
    return lambda: make_policy(seed=1, tie_word_embeddings=True).save_pretrained(base)


def test_an_adapter_is_not_resumed_on_a_base_of_the_same_sizes(base, other_weights, tokenizer, pairs, tmp_path):
    train_adapter(base, tokenizer, pairs, tmp_path / "run", Lora(r=2))
    other_weights()
    with pytest.raises(
        ValueError,
        match=f"step-000002 was trained on a base whose weights differ from those of {base}",
    ):
        train_adapter(base, tokenizer, pairs, tmp_path, Lora(r=2), resume=tmp_path / "run" / "step-000002")


def test_an_adapter_is_neither_merged_into_nor_put_on_a_base_of_the_same_sizes(
    base, other_weights, tokenizer, pairs, tmp_path
):
    train_adapter(base, tokenizer, pairs, tmp_path / "run", Lora(r=2))
    other_weights()
    adapter = tmp_path / "run" / "step-000004" / "model"
    with pytest.raises(
        ValueError,
        match=rf"{adapter} was trained on a base whose weights differ from those of {base}; restore the base",
    ):
        merge_adapter(adapter, tmp_path / "merged")
    with pytest.raises(
        ValueError,
        match=rf"{adapter} was trained on a base whose weights differ from those of {base}; restore the base",
    ):
        load_policy(base, adapter=adapter)
    (adapter / BASE).unlink()  # as of adapters from elsewhere
    load_policy(base, adapter=adapter)
    merge_adapter(adapter, tmp_path / "merged")


def test_a_checkpoint_that_does_not_name_its_base_is_resumed(base, other_weights, tokenizer, pairs, tmp_path):
    train_adapter(base, tokenizer, pairs, tmp_path, Lora(r=2))
    manifest = tmp_path / "step-000002" / "manifest.json"
    told = json.loads(manifest.read_text())
    assert len(told.pop("base")) == 64
    manifest.write_text(json.dumps(told))
    other_weights()
    _, steps = train_adapter(base, tokenizer, pairs, tmp_path, Lora(r=2), resume=tmp_path / "step-000002")
    assert [step.step for step in steps] == [3, 4]


@pytest.mark.parametrize(
    "config", [LlamaConfig(**SIZES), MIXTRAL, FALCON_H1, LLAMA4], ids=lambda config: config.model_type
)
def test_the_fingerprint_of_a_base_depends_neither_on_precision_nor_on_an_adapter(config, tokenizer, tmp_path):
    policy, _ = adapted(config, tokenizer, tmp_path, Lora(r=2, use_dora=config.model_type == "llama"))
    known = fingerprint(load_policy(tmp_path).requires_grad_(False))
    assert fingerprint(policy) == known
    assert fingerprint(load_policy(tmp_path, adapter=Lora(r=2), dtype=torch.bfloat16)) == known
    assert fingerprint_of(tmp_path) == known
    name, weight = next((n, p) for n, p in policy.named_parameters() if "q_proj" in n and not p.requires_grad)
    weight.data *= 1.1
    assert fingerprint(policy) != known, name


def test_a_new_adapter_has_learned_nothing_and_one_with_broken_numbers_is_refused(base, tmp_path):
    policy = load_policy(base, adapter=Lora(r=2))
    weight = next(weight for name, weight in policy.named_parameters() if "lora_B" in name)
    policy.save_pretrained(tmp_path / "new")
    assert not has_learned(tmp_path / "new")
    weight.data[0, 0] = 1e-6
    policy.save_pretrained(tmp_path / "trained")
    assert has_learned(tmp_path / "trained")
    weight.data[0, 0] = torch.inf
    policy.save_pretrained(tmp_path / "broken")
    with pytest.raises(
        UnusableModel, match=r"NaN or infinite values, such as in base_model.*lora_B.*; use an earlier checkpoint"
    ):
        has_learned(tmp_path / "broken")


def test_the_fingerprint_of_a_base_does_not_depend_on_a_reward_models_new_head(base):
    seen = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        seen.add(fingerprint(load_reward_model(base, adapter=Lora(r=2))))
    assert len(seen) == 1


def test_an_adapter_whose_base_is_gone_is_refused_by_its_name(base, tmp_path):
    load_policy(base, adapter=Lora(r=2)).save_pretrained(tmp_path / "adapter")
    base.rename(tmp_path / "moved")
    with pytest.raises(
        ValueError,
        match=f"adapter was trained on the base in {base}, but that folder does not exist; restore the folder",
    ):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")


def test_an_adapter_of_one_revision_of_its_base_is_not_merged_into_another(base, tmp_path):
    load_policy(base, adapter=Lora(r=2)).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"revision": "abc"}))
    with pytest.raises(ValueError, match=f"adapter belongs to revision abc of {base}; download that"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")


def test_a_merged_model_is_not_written_into_the_folder_of_its_adapter(base, tmp_path):
    load_policy(base, adapter=Lora(r=2)).save_pretrained(tmp_path / "adapter")
    files = sorted((tmp_path / "adapter").iterdir())
    with pytest.raises(ValueError, match="adapter is the adapter's own folder; name another"):
        merge_adapter(tmp_path / "adapter", tmp_path / "adapter" / "." / ".." / "adapter")
    assert sorted((tmp_path / "adapter").iterdir()) == files


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (Lora(r=4, alpha=4), "lora_alpha 64, but the policy's has 4"),
        (Lora(r=4, use_rslora=True), "use_rslora False, but the policy's has True"),
    ],
)
def test_an_adapter_that_counts_for_more_or_less_is_not_resumed(other, reason, base, tokenizer, pairs, tmp_path):
    train_adapter(base, tokenizer, pairs, tmp_path, Lora(r=4))
    with pytest.raises(ValueError, match=f"has an adapter with {reason}; load the policy with the same Lora options"):
        train_adapter(base, tokenizer, pairs, tmp_path, other, resume=tmp_path / "step-000002")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_several_adapters_are_refused_by_name(base, pairs):
    policy = load_policy(base, adapter=Lora(r=2))
    policy.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "second")
    with pytest.raises(
        ValueError,
        match=r"The model has several adapters .*; delete the others with",
    ):
        score_reference(policy, pairs, max_tokens_per_pack=64)


def test_a_head_that_was_adapted_elsewhere_is_refused(policy, pairs):
    policy.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="has an adapter on its head"):
        score_reference(policy, pairs, max_tokens_per_pack=64)


@pytest.mark.parametrize(("field", "value"), [("r", 0), ("alpha", 0.0), ("target_modules", ())])
def test_options_beyond_their_limits_are_refused(field, value):
    with pytest.raises(InvalidOption, match=field):
        Lora(**{field: value})
