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
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
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

from dpo_core.encoding.encode import EncodedGroup
from dpo_core.models.model import check_model, load_policy, load_reward_model, load_tokenizer
from dpo_core.options import Dpo
from dpo_core.policy.measures import Measures
from dpo_core.policy.scorer import Scorer, score_reference
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


def test_order_within_a_pack_changes_nothing(policy, pairs):
    scorer = Scorer(policy)
    forwards, _ = scorer.token_logps(scorer.collate(pairs))
    backwards, _ = scorer.token_logps(scorer.collate(pairs[::-1]))
    sizes = [sum(map(len, group.completion_ids)) for group in pairs]
    reordered = torch.cat(backwards.split(sizes[::-1])[::-1])
    torch.testing.assert_close(forwards, reordered, rtol=1e-5, atol=1e-5)


def test_a_target_that_is_the_likeliest_token_counts_as_correct(policy, demonstrations):
    scorer = Scorer(policy)
    group = demonstrations[1]
    ids = torch.tensor([[*group.prompt_ids, *group.completion_ids[0]]])
    likeliest = policy(input_ids=ids).logits[0, len(group.prompt_ids) - 1 : -1].argmax(-1)
    _, correct = scorer.token_logps(scorer.collate([group]))
    assert correct.tolist() == (likeliest == torch.tensor(group.completion_ids[0])).tolist()


@pytest.mark.parametrize("budget", [1, 60, 8192])
def test_the_reference_gives_sums_and_those_of_heads_in_the_order_of_the_groups(
    policy, make_groups, plain_token_logps, budget
):
    groups = make_groups(5, 3)
    found = score_reference(policy, groups, max_tokens_per_pack=budget)
    for group, scored in zip(groups, found, strict=True):
        plain = plain_token_logps(policy, group)
        assert scored.ref_logps == pytest.approx([logps.sum().item() for logps in plain], rel=1e-5, abs=1e-4)
        heads = [logps[: group.head_length].sum().item() for logps in plain]
        assert scored.ref_head_logps == pytest.approx(heads, rel=1e-5, abs=1e-4)


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
        with pytest.raises(ValueError, match="use bfloat16 or float32"):
            load(tmp_path, dtype=torch.float16)
    with pytest.raises(ValueError, match="use bfloat16 or float32"):
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
