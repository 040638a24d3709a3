import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    Mistral3Config,
    MistralConfig,
    MistralForCausalLM,
    MistralForSequenceClassification,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    ViTConfig,
)

from dpo_core.models.model import check_model, load_policy, load_reward_model, load_tokenizer
from dpo_core.options import Dpo
from dpo_core.policy.scorer import Scorer
from tests.dpo_core import conftest

SIZES = conftest.SIZES | {"initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

ARCHITECTURES = {
    "qwen2": (Qwen2Config(**SIZES), True),
    "qwen3 with tied embeddings": (Qwen3Config(**SIZES, tie_word_embeddings=True), True),
    "mistral with a window of 6": (MistralConfig(**SIZES, sliding_window=6), True),
    "gemma3": (Gemma3TextConfig(**SIZES, sliding_window=6), True),
    "gemma3 with capped logits": (Gemma3TextConfig(**SIZES, final_logit_softcapping=5.0), True),
    "olmo2": (Olmo2Config(**SIZES), True),
    "phi3": (Phi3Config(**SIZES), True),
    "cohere, which scales logits": (CohereConfig(**SIZES, logit_scale=0.25), True),
    "granite, which divides logits": (GraniteConfig(**SIZES, logits_scaling=4.0), True),
    "mixtral, a mixture of experts": (MixtralConfig(**SIZES, num_local_experts=4), True),
    "qwen3 moe": (
        Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True),
        True,
    ),
    "gpt2": (GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3), True),
    "gemma2, which caps attention": (Gemma2Config(**SIZES), False),
    "positions that stretch with the stream": (
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        False,
    ),
    "qwen3 next, most of whose layers have a state": (
        Qwen3NextConfig(
            **SIZES | {"num_hidden_layers": 4},
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
        False,
    ),
    "mamba, which has a state": (
        MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, initializer_range=0.3),
        False,
    ),
}


def gradients(policy: PreTrainedModel, objective: torch.Tensor) -> torch.Tensor:
    policy.zero_grad()
    objective.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def assert_same_as_plain(policy, groups, logps, plain_token_logps):
    """Asserts that log-probabilities and their gradients equal those of a plain forward pass.

    The tolerance is 1e-5 for values, and 1e-4 relative for gradients. Every completion has another weight in the sum
    that is differentiated.
    """
    expected = torch.cat([logps for group in groups for logps in plain_token_logps(policy, group)])
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 1, len(expected))
    ours, theirs = gradients(policy, logps @ weights), gradients(policy, expected @ weights)
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-4


@pytest.mark.parametrize("num_completions", [1, 2, 4])
def test_sharing_prompts_in_a_pack_changes_nothing(policy, make_groups, num_completions, plain_token_logps):
    groups = make_groups(6, num_completions)
    scorer = Scorer(policy)
    assert scorer.shares_prompts
    logps, _ = scorer.token_logps(scorer.collate(groups))
    assert_same_as_plain(policy, groups, logps, plain_token_logps)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_share_or_run_in_batches_and_agree(name, pairs, plain_token_logps, caplog):
    config, shares = ARCHITECTURES[name]
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(config).eval()
    with caplog.at_level(logging.WARNING, "dpo_core.policy.scorer"):
        scorer = Scorer(policy)
    assert scorer.shares_prompts == shares
    assert scorer.takes_batches == (name != "positions that stretch with the stream")
    assert sum(record.name == "dpo_core.policy.scorer" for record in caplog.records) == (0 if shares else 1)
    logps, _ = scorer.token_logps(scorer.collate(pairs))
    assert_same_as_plain(policy, pairs, logps, plain_token_logps)


def test_a_loaded_policy_is_float32_and_has_no_dropout(make_policy, tokenizer, tmp_path):
    make_policy(0, attention_dropout=0.5).to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = load_policy(tmp_path)
    assert policy.dtype == torch.float32
    assert not policy.training
    assert load_tokenizer(tmp_path).chat_template == tokenizer.chat_template


def test_pickled_weights_are_refused(policy, tmp_path):
    policy.config.save_pretrained(tmp_path)
    torch.save(policy.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_policy(tmp_path)


def test_code_that_travels_with_a_model_is_not_run(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    trap = config.replace('"llama"', '"trap"').replace("{", '{"auto_map": {"AutoConfig": "trap.Trap"},', 1)
    (tmp_path / "config.json").write_text(trap)
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Trap: pass\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_policy(tmp_path)
    assert not (tmp_path / "sprung").exists()


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "config",
    [
        GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
        MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, initializer_range=0.3),
        BloomConfig(vocab_size=320, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
        GPTJConfig(vocab_size=320, n_embd=32, n_layer=2, n_head=4, rotary_dim=8, initializer_range=0.3),
    ],
    ids=lambda config: config.model_type,
)
def test_a_model_without_sdpa_loads_with_the_attention_that_it_has(
    config, tokenizer, tmp_path, pairs, plain_token_logps
):
    torch.manual_seed(0)
    policy = load_policy(save(AutoModelForCausalLM.from_config(config), tokenizer, tmp_path))
    scorer = Scorer(policy)
    logps, _ = scorer.token_logps(scorer.collate(pairs))
    assert_same_as_plain(policy, pairs, logps, plain_token_logps)


def test_attention_does_not_depend_on_how_the_folder_was_saved(policy, tokenizer, tmp_path):
    file = save(policy, tokenizer, tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_attn_implementation": "flash_attention_2"}))
    assert load_policy(tmp_path).config._attn_implementation == "sdpa"


TEXT = conftest.SIZES | {"model_type": "mistral", "initializer_range": 0.3}
VISION = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def test_a_multimodal_model_without_a_class_for_texts_loads_as_its_text_model(
    tokenizer, tmp_path, pairs, plain_token_logps
):
    torch.manual_seed(0)
    config = Mistral3Config(text_config=TEXT, vision_config=VISION, tie_word_embeddings=False)
    whole = AutoModelForImageTextToText.from_config(config).eval()
    policy = load_policy(save(whole, tokenizer, tmp_path))
    assert isinstance(policy, MistralForCausalLM)
    expected, found = (torch.cat(plain_token_logps(model, pairs[1])) for model in (whole, policy))
    torch.testing.assert_close(found, expected)
    assert isinstance(load_reward_model(tmp_path), MistralForSequenceClassification)


def test_a_model_that_writes_no_texts_is_refused(tokenizer, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    save(AutoModel.from_config(ViTConfig(**sizes, image_size=8, patch_size=4)), tokenizer, tmp_path)
    with pytest.raises(ValueError, match="has the model type vit, which transformers cannot train on texts"):
        load_policy(tmp_path)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8"])
def test_a_quantized_model_is_refused(method, policy, tokenizer, tmp_path):
    file = save(policy, tokenizer, tmp_path) / "config.json"
    quantized = {"quantization_config": {"quant_method": method, "bits": 4, "load_in_4bit": True}}
    file.write_text(json.dumps(json.loads(file.read_text()) | quantized))
    with pytest.raises(
        ValueError, match=rf"is a quantized model \({method}\), which cannot be trained; train the full-precision model"
    ):
        load_policy(tmp_path)


def test_gpt_oss_in_mxfp4_is_expanded(tokenizer, tmp_path):
    torch.manual_seed(0)
    config = GptOssConfig(**SIZES | {"intermediate_size": 32}, num_local_experts=4, num_experts_per_tok=2)
    save(AutoModelForCausalLM.from_config(config), tokenizer, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for expert in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        num, width, outputs = weights.pop(expert).shape
        blocks = torch.zeros(num, outputs, width // 32, 16, dtype=torch.uint8)
        blocks[0] = 0x22  # two numbers of four bits, each 1
        scales = torch.full((num, outputs, width // 32), 127 - 3, dtype=torch.uint8)
        weights |= {f"{expert}_blocks": blocks, f"{expert}_scales": scales}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    file = tmp_path / "config.json"
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantized = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantized}))
    policy = load_policy(tmp_path)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    first, *others = policy.get_parameter("model.layers.0.mlp.experts.down_proj")
    assert torch.equal(first, torch.full_like(first, 2**-3))
    assert not torch.stack(others).any()
    policy.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_float16_is_refused(policy, tokenizer, tmp_path):
    save(policy, tokenizer, tmp_path)
    for load in (load_policy, load_reward_model):
        with pytest.raises(ValueError, match="use 'bfloat16' or 'float32'"):
            load(tmp_path, dtype=torch.float16)
    with pytest.raises(ValueError, match="use 'bfloat16' or 'float32'"):
        check_model(policy.half(), Dpo())


def test_a_frozen_model_is_refused(policy):
    policy.requires_grad_(False)
    with pytest.raises(
        ValueError,
        match=(
            r"All weights of the policy \(LlamaForCausalLM\) are frozen; "
            r"set requires_grad"
        ),
    ):
        check_model(policy, Dpo())
