"""Tests a frozen base model in NF4 against the numbers of arXiv 2305.14314, and adapters trained on it and merged."""

from dataclasses import replace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig

from dpo_core.config import Lora, Optim, TrainConfig
from dpo_core.models.adapter import fingerprint
from dpo_core.models.model import load_policy, load_reward_model, merge_adapter
from dpo_core.models.quantization import scales_of, shape_of
from dpo_core.options import InvalidOption
from dpo_core.policy.flops import Flops
from dpo_core.policy.scorer import Scorer, score_reference
from dpo_core.training import weights
from dpo_core.training.trainer import train

WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "initializer_range": 0.05}
CONFIG = TrainConfig(optim=Optim(learning_rate=1e-2), batch_size=8, n_epochs=1, max_length=64, checkpoint_steps=2)
# Of the paper, its appendix E.
CODES = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
ROUNDING = 0.01  # of the largest numbers of blocks, which are kept in 8 bits: what we tolerate of a whole matrix
APART = 0.01  # how far logps in NF4 may lie from those in float32, as a share of them


@pytest.fixture(scope="module")
def base(make_policy, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_policy(tie_word_embeddings=True, **WIDE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def in_nf4(base, **options):
    return load_policy(base, **({"adapter": Lora(r=4), "quantization": "nf4"} | options))


def rounded(weight):
    blocks = weight.reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    return (CODES[((blocks / largest)[..., None] - CODES).abs().argmin(-1)] * largest).reshape(weight.shape)


def linears(policy):
    return {name: module for name, module in policy.named_modules() if isinstance(module, Linear4bit)}


def apart(ours, theirs):
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


def ref_logps(groups, policy):
    scored = score_reference(policy, groups, max_tokens_per_pack=8192)
    return torch.tensor([logp for group in scored for logp in group.ref_logps])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_base_is_rounded_as_the_paper_says_and_takes_a_quarter_of_bfloat16(base, dtype):
    whole, policy = load_policy(base, dtype=dtype), in_nf4(base, dtype=dtype)
    found = linears(policy)
    assert len(found) == 2 * 7  # of each layer attention's and the network's, not the head
    for name, module in found.items():
        expected = rounded(whole.get_submodule(name.removesuffix(".base_layer")).weight.float())
        product = module(torch.eye(expected.shape[1], dtype=dtype)).T
        assert product.dtype == dtype
        assert apart(product, expected) < ROUNDING
        assert module.weight.nbytes * 2 == expected.numel()
        assert shape_of(module.weight) == expected.shape
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {dtype}
    assert policy.model.embed_tokens.weight.dtype == policy.dtype == dtype
    assert not any(module.training for module in found.values())


def test_logps_are_near_those_of_float32_and_a_wrong_sign_or_scale_is_not(base, pairs):
    expected, policy = ref_logps(pairs, load_policy(base)), in_nf4(base)
    assert apart(ref_logps(pairs, policy), expected) < APART
    scale = policy.model.layers[0].mlp.down_proj.base_layer.weight.quant_state
    for wrong in (-1, 2):
        scale.offset, scale.state2.absmax = scale.offset * wrong, scale.state2.absmax * wrong
        assert apart(ref_logps(pairs, policy), expected) > APART
        scale.offset, scale.state2.absmax = scale.offset / wrong, scale.state2.absmax / wrong


def gradients(policy, pairs):
    scorer = Scorer(policy)
    scorer(scorer.collate(pairs))[:, 0].sum().backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}


def test_gradients_are_those_of_the_rounded_base_after_it_was_its_own_reference_too(base, pairs):
    policy, whole = in_nf4(base), load_policy(base, adapter=Lora(r=4))
    with torch.no_grad():
        for name, module in linears(policy).items():
            own = whole.get_submodule(name).weight
            own.copy_(module(torch.eye(own.shape[1])).T)
    score_reference(policy, pairs, max_tokens_per_pack=8192)  # a forward without gradients, as CPUs have their own
    torch.testing.assert_close(gradients(policy, pairs), gradients(whole, pairs), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_rounds_and_computes_as_a_cpu_does(base, pairs, dtype):
    ours, theirs = (in_nf4(base, dtype=dtype, device=device) for device in ("cuda", "cpu"))
    assert {tensor.device.type for tensor in (*ours.parameters(), *scales_of(ours))} == {"cuda"}
    assert apart(ref_logps(pairs, ours), ref_logps(pairs, theirs)) < APART / 5
    found, expected = gradients(ours, pairs), gradients(theirs, pairs)
    assert all(apart(found[name].cpu(), expected[name]) < 0.1 for name in found if "lora_B" in name)


@pytest.mark.parametrize("adapter", [Lora(r=4), Lora(r=4, use_dora=True)], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_learns_is_saved_and_merges_into_the_base_that_it_was_trained_on(
    adapter, dtype, base, tokenizer, pairs, tmp_path
):
    policy = in_nf4(base, adapter=adapter, dtype=dtype)
    frozen = {name: p.clone() for name, p in policy.named_parameters() if not p.requires_grad}
    scored = score_reference(policy, pairs, max_tokens_per_pack=8192)
    steps = list(train(CONFIG, policy, tokenizer, [scored] * 2, total_steps=2, checkpoint_dir=tmp_path))
    assert steps[0].metrics["rewards/margins"] == pytest.approx(0, abs=1e-3)
    assert steps[1].metrics["loss"] < steps[0].metrics["loss"]
    assert all(torch.equal(frozen[name], p) for name, p in policy.named_parameters() if name in frozen)

    saved = tmp_path / "step-000002" / "model"
    assert {tensor.dtype for tensor in load_file(saved / "adapter_model.safetensors").values()} == {dtype}
    assert not (saved / "config.json").exists()
    again = in_nf4(base, adapter=saved, dtype=dtype)
    ids = torch.tensor([[*pairs[3].prompt_ids, *pairs[3].completion_ids[0]]])
    torch.testing.assert_close(again(input_ids=ids).logits, policy(input_ids=ids).logits, rtol=0, atol=0)

    merge_adapter(saved, tmp_path / "merged", dtype="float32")
    merged = load_policy(tmp_path / "merged")(input_ids=ids).logits
    unrounded = load_policy(base, adapter=saved)(input_ids=ids).logits
    ours, theirs = (apart(logits, policy(input_ids=ids).logits) for logits in (merged, unrounded))
    assert ours < (1e-4 if dtype == torch.float32 else theirs)
    assert theirs > 1e-3


def test_a_run_goes_on_bit_for_bit_and_not_on_a_base_in_another_precision(base, tokenizer, pairs, tmp_path):
    config, policy = replace(CONFIG, checkpoint_steps=1), in_nf4(base)
    list(train(config, policy, tokenizer, [pairs] * 2, total_steps=2, checkpoint_dir=tmp_path))

    def go_on(resumed):
        first = tmp_path / "step-000001"
        return list(
            train(
                config, resumed, tokenizer, [pairs] * 2, total_steps=2, checkpoint_dir=tmp_path / "again", resume=first
            )
        )

    resumed = in_nf4(base)
    go_on(resumed)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, trained[name]) for name, p in resumed.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="trained in float32 over nf4, but the policy is in float32"):
        go_on(load_policy(base, adapter=Lora(r=4)))


def test_a_reward_model_has_its_head_whole(base):
    policy = load_reward_model(base, adapter=Lora(r=4), quantization="nf4")
    assert len(linears(policy)) == 14
    assert policy.score.modules_to_save["default"].weight.requires_grad


def test_flops_are_those_of_the_matrices(base, pairs):
    ours, theirs = in_nf4(base), load_policy(base, adapter=Lora(r=4))
    batch = Scorer(theirs).collate(pairs)
    assert Flops(ours).count(batch) == Flops(theirs).count(batch)


@pytest.mark.parametrize("config", [GPT2Config, MixtralConfig], ids=["no linear layer", "stacked experts"])
def test_a_model_whose_weights_mostly_lie_elsewhere_is_refused(config, sizes, tmp_path):
    AutoModelForCausalLM.from_config(config(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(InvalidOption, match="'quantization' is 'nf4', which only compresses linear layers") as refused:
        in_nf4(tmp_path)
    assert refused.value.field == "quantization"


def test_without_an_adapter_it_is_refused_before_anything_is_read():
    with pytest.raises(InvalidOption, match=r"'quantization' is 'nf4'.* add an adapter") as refused:
        load_policy("nowhere", quantization="nf4")
    assert refused.value.field == "quantization"


def test_weights_that_are_no_numbers_are_refused_as_ever(base, tmp_path):
    broken = load_policy(base)
    nn.init.constant_(broken.model.layers[1].mlp.up_proj.weight[:1], torch.nan)
    broken.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="contains NaN or infinity"):
        in_nf4(tmp_path)


def test_it_cannot_be_split_and_auto_does_not_try(base, monkeypatch):
    scorer = Scorer(in_nf4(base))
    monkeypatch.setattr(weights, "num_ranks", lambda: 2)
    with pytest.raises(InvalidOption, match="'sharding' is 'full', but a base model in nf4") as refused:
        weights.shard(scorer, "full")
    assert refused.value.field == "sharding"
    scorer.model.__class__ = type("OnGpu", (type(scorer.model),), {"device": torch.device("cuda")})
    assert weights.num_shards(scorer, "auto") == 1


def test_an_adapter_knows_its_base_in_nf4_and_in_full(make_policy, tmp_path):
    base, other = tmp_path / "base", tmp_path / "other"
    make_policy(0).save_pretrained(base)
    make_policy(1).save_pretrained(other)
    whole, quantized = (load_policy(base, adapter=Lora(r=2), quantization=each) for each in (None, "nf4"))
    assert fingerprint(quantized) == fingerprint(whole)
    assert fingerprint(load_policy(other, adapter=Lora(r=2), quantization="nf4")) != fingerprint(whole)
