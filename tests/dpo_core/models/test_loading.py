"""Tests that a folder loads as exactly the model of its config, and that other folders are refused."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, VaultGemmaConfig

from dpo_core.config import Lora, Optim, TrainConfig
from dpo_core.models.model import load_policy, load_reward_model
from dpo_core.training.trainer import train
from tests.dpo_core import conftest

CONFIG = TrainConfig(optim=Optim(learning_rate=1e-3), batch_size=8, n_epochs=1, checkpoint_steps=1, max_length=64)


@pytest.fixture
def folder(policy, tokenizer, tmp_path):
    policy.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def configure(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def add(name, *shape):
    return lambda weights: weights.update({name: torch.ones(shape)})


DISAGREEING = {
    "a layer more in the config": (
        lambda folder: configure(folder, num_hidden_layers=3),
        r"lacks 9 weights, such as model\.layers\.2\.\S+, of the LlamaForCausalLM that its config.json describes",
    ),
    "a layer less in the config": (
        lambda folder: configure(folder, num_hidden_layers=1),
        r"has 9 weights, such as model\.layers\.1\.\S+, that do not belong to the LlamaForCausalLM",
    ),
    "another width": (
        lambda folder: configure(folder, intermediate_size=80),
        r"weight model\.layers\.0\.mlp\.down_proj\.weight has the shape \(32, 64\), but .* needs \(32, 80\)",
    ),
    "another vocabulary": (
        lambda folder: configure(folder, vocab_size=384),
        (
            r"weight lm_head\.weight has the shape \(320, 32\), but .* needs \(384, 32\); "
            r"use weights and a config.json of the"
        ),
    ),
    "no head": (
        lambda folder: rewrite(folder, lambda weights: weights.pop("lm_head.weight")),
        r"lacks 1 weights, such as lm_head\.weight, of the LlamaForCausalLM that its config.json describes",
    ),
    "a norm of another architecture": (
        lambda folder: rewrite(folder, add("model.layers.0.self_attn.q_norm.weight", 8)),
        r"has 1 weights, such as model\.layers\.0\.self_attn\.q_norm\.weight, that do not belong to",
    ),
    "the head of a reward model": (
        lambda folder: (configure(folder, tie_word_embeddings=True), rewrite(folder, add("score.weight", 1, 32))),
        r"has 1 weights, such as score\.weight, that do not belong to",
    ),
    "a padding id beyond the vocabulary": (
        lambda folder: configure(folder, pad_token_id=320),
        r"base has pad_token_id 320, but the vocabulary has only 320 tokens; set pad_token_id to a token of the",
    ),
    "weights of four bits, as bitsandbytes once marked them": (
        lambda folder: configure(folder, quantization_config={"load_in_4bit": True}),
        r"is a quantized model \(of an unnamed method\), which cannot be trained",
    ),
    "a number that is none": (
        lambda folder: rewrite(folder, lambda weights: weights["model.norm.weight"][3:4].fill_(torch.nan)),
        r"model\.norm\.weight of \S+base contains NaN or infinity; use an earlier checkpoint",
    ),
    "weights of two models": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {}}'),
        r"base holds weights twice, in model.safetensors and model.safetensors.index.json; remove one of the two files",
    ),
    "a file that is cut": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        r"base cannot be read \(.*\); download them again",
    ),
}


@pytest.mark.parametrize("name", DISAGREEING)
def test_a_folder_whose_weights_do_not_fit_its_config_is_refused(name, folder):
    disagree, sentence = DISAGREEING[name]
    disagree(folder)
    with pytest.raises(ValueError, match=sentence):
        load_policy(folder)


def test_a_missing_file_of_several_is_refused_by_name(policy, tmp_path):
    policy.save_pretrained(tmp_path, max_shard_size="40KB")
    (tmp_path / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00004\.safetensors\); download them again"):
        load_policy(tmp_path)


LEFT_OVER = [
    "model.layers.0.self_attn.rotary_emb.inv_freq",  # tables that old releases saved
    "model.layers.0.self_attn.masked_bias",
    "model.vision_tower.layers.0.weight",  # what is not trained on texts
    "v_head.summary.weight",
]


@pytest.mark.parametrize("name", LEFT_OVER)
def test_weights_that_texts_do_not_need_may_be_there(name, folder):
    rewrite(folder, add(name, 4))
    load_policy(folder)


def test_layers_that_predict_further_tokens_may_be_there(folder):
    configure(folder, num_nextn_predict_layers=1)
    rewrite(folder, add("model.layers.2.mlp.up_proj.weight", 64, 32))
    load_policy(folder)
    rewrite(folder, add("model.layers.3.mlp.up_proj.weight", 64, 32))
    with pytest.raises(ValueError, match=r"such as model\.layers\.3\.mlp\.up_proj\.weight"):
        load_policy(folder)


def test_a_new_head_is_all_that_a_reward_model_may_lack(folder, tmp_path):
    load_reward_model(folder, num_outputs=2).save_pretrained(tmp_path / "rewards")
    load_reward_model(tmp_path / "rewards", num_outputs=2)
    with pytest.raises(
        ValueError,
        match=r"score\.weight has the shape \(2, 32\), but .* needs \(1, 32\); load the model with num_outputs=2",
    ):
        load_reward_model(tmp_path / "rewards")
    with pytest.raises(ValueError, match=r"lacks 1 weights, such as lm_head.weight, of the LlamaForCausalLM"):
        load_policy(tmp_path / "rewards")
    rewrite(folder, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 weights, such as .* of the LlamaForSequenceClassification"):
        load_reward_model(folder)


@pytest.mark.parametrize("load", [load_policy, load_reward_model])
@pytest.mark.parametrize("beside", ["alone", "beside whole weights"])
def test_the_folder_of_an_adapter_is_no_model(load, beside, folder, tmp_path):
    """transformers would load the base model that the adapter's config names, and freeze it."""
    load_policy(folder, adapter=Lora(r=2)).save_pretrained(tmp_path / "adapter")
    if beside != "alone":
        shutil.copytree(folder, tmp_path / "adapter", dirs_exist_ok=True)
    with pytest.raises(
        ValueError, match="adapter holds an adapter, not a whole model; merge the adapter into its base with merge_"
    ):
        load(tmp_path / "adapter")


def test_a_head_that_differs_from_the_embeddings_is_served_as_it_was_trained(folder, tokenizer, pairs, tmp_path):
    """The config ties the head to the embeddings, and vLLM does what the config says."""
    configure(folder, tie_word_embeddings=True)
    policy = load_policy(folder)
    (_,) = train(CONFIG, policy, tokenizer, [pairs], total_steps=1, checkpoint_dir=tmp_path)
    saved = tmp_path / "step-000001" / "model"
    assert json.loads((saved / "config.json").read_text())["tie_word_embeddings"] is False
    again = AutoModelForCausalLM.from_pretrained(saved)
    torch.testing.assert_close(dict(again.named_parameters()), dict(policy.named_parameters()), rtol=0, atol=0)


@pytest.mark.parametrize("adapter", [None, Lora(r=2)], ids=["whole", "adapter"])
def test_how_a_model_was_last_run_does_not_matter(adapter, folder, make_policy, tokenizer, pairs, scored, tmp_path):
    configure(folder, return_dict=False, output_attentions=True, output_hidden_states=True, use_cache=False)
    policy, groups = load_policy(folder, adapter=adapter), scored(pairs, make_policy())
    assert policy(input_ids=torch.tensor([[5, 6]])).hidden_states is None
    (first,) = train(CONFIG, policy, tokenizer, [groups], total_steps=1, checkpoint_dir=tmp_path)
    assert first.metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_head_saved_beside_equal_embeddings_stays_tied(folder, make_policy):
    make_policy(tie_word_embeddings=True).save_pretrained(folder)
    rewrite(folder, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}))
    policy = load_policy(folder)
    assert policy.config.tie_word_embeddings
    assert policy.lm_head.weight is policy.model.embed_tokens.weight


def test_weights_in_float16_are_trained_in_float32(make_policy, folder):
    half = make_policy().half()
    half.save_pretrained(folder)
    policy = load_policy(folder)
    assert policy.dtype == torch.float32
    assert torch.equal(policy.lm_head.weight, half.lm_head.weight.float())


@pytest.mark.parametrize("kind", [Gemma2Config, VaultGemmaConfig])
def test_a_cap_of_attentions_scores_is_computed(kind, tmp_path):
    """SDPA, which transformers would choose, ignores the cap."""
    config = kind(**conftest.SIZES, initializer_range=0.3, attn_logit_softcapping=0.5)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    ids = torch.arange(5, 35)[None]
    capped, ignored = (
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)(ids).logits
        for name in ("eager", "sdpa")
    )
    assert (capped - ignored).abs().max() > 0.1
    torch.testing.assert_close(load_policy(tmp_path)(ids).logits, capped)
