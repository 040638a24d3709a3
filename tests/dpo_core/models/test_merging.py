"""Tests the merging of adapters for download, and the measurement of what the merge changes."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dpo_core.config import Lora
from dpo_core.models import merging
from dpo_core.models.merging import merge_and_compare
from dpo_core.models.model import load_attached, load_policy, load_reward_model, merge_adapter
from dpo_core.models.quantization import is_quantized


@pytest.fixture
def base(make_policy, tokenizer, tmp_path):
    folder = tmp_path / "base"
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    make_policy().to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(base, tokenizer, folder, load=load_policy, **options):
    """Writes a random adapter, which changes its base model's outputs, to the folder."""
    policy = load(base, adapter=Lora(r=4), **options)
    torch.manual_seed(1)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_merged_folder_is_in_float32_and_answers_as_its_adapter_does(quantization, base, tokenizer, tmp_path):
    adapter = save_adapter(base, tokenizer, tmp_path / "adapter", quantization=quantization)
    if quantization:
        (adapter / "base_model.json").write_bytes(merging_base_file(base))
    found = merge_and_compare(adapter, tmp_path / "merged", base=base)
    assert (found.difference_of, found.num_tokens) == ("logprobs", 128)
    assert 0 < found.largest_difference < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float32
    texts = torch.randint(len(tokenizer), (1, 30), generator=torch.Generator().manual_seed(7))
    attached = load_attached(adapter, base=base, dtype=torch.float32)
    torch.testing.assert_close(merged(texts).logits, attached(texts).logits, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tokenizer.chat_template


def test_a_merge_in_bfloat16_is_the_merge_in_float32_rounded_once(base, tokenizer, tmp_path):
    adapter = save_adapter(base, tokenizer, tmp_path / "adapter")
    merge_and_compare(adapter, tmp_path / "exact", base=base)
    merge_adapter(adapter, tmp_path / "served", base=base, dtype="bfloat16")
    exact, served = (
        dict(AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto").named_parameters())
        for name in ("exact", "served")
    )
    assert exact.keys() == served.keys()
    for name, weight in served.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, exact[name].to(torch.bfloat16)), name


def merging_base_file(base):
    from dpo_core.models.adapter import base_file, fingerprint

    quantized = load_policy(base, adapter=Lora(r=4), quantization="nf4")
    assert is_quantized(quantized)
    return base_file(fingerprint(quantized), quantized)


def test_a_merged_reward_model_gives_the_rewards_of_its_adapter(base, tokenizer, tmp_path):
    adapter = save_adapter(base, tokenizer, tmp_path / "adapter", load=load_reward_model)
    found = merge_and_compare(adapter, tmp_path / "merged", base=base)
    assert found.difference_of == "rewards"
    assert found.largest_difference < 1e-4
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").num_labels == 1


def test_a_merge_that_changes_answers_is_measured(base, tokenizer, tmp_path, monkeypatch):
    adapter = save_adapter(base, tokenizer, tmp_path / "adapter")

    def lossy(*arguments, **options):
        model = load_attached(*arguments, **options)
        merge = model.merge_and_unload
        model.merge_and_unload = lambda: merge().to(torch.bfloat16)
        return model

    monkeypatch.setattr(merging, "load_attached", lossy)
    assert merge_and_compare(adapter, tmp_path / "merged", base=base).largest_difference > 1e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_merge_whose_outputs_are_not_finite_is_refused(value, base, tokenizer, tmp_path, monkeypatch):
    adapter = save_adapter(base, tokenizer, tmp_path / "adapter", load=load_reward_model)

    def breaking(*arguments, **options):
        model = load_attached(*arguments, **options)
        merge = model.merge_and_unload

        def merge_into_nothing():
            merged = merge()
            torch.nn.init.constant_(merged.score.weight, value)
            return merged

        model.merge_and_unload = merge_into_nothing
        return model

    monkeypatch.setattr(merging, "load_attached", breaking)
    with pytest.raises(ValueError, match="are NaN or infinite; merge an earlier checkpoint"):
        merge_and_compare(adapter, tmp_path / "merged", base=base)
    assert not (tmp_path / "merged").exists()
