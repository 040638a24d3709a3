"""Tries every family of decoder models in transformers: a tiny model is loaded, scored, trained, saved and resumed.

python -m tests.dpo_core.models.families > docs/use/models.md
"""

import logging
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from dpo_core.config import Lora, Optim, TrainConfig
from dpo_core.encoding.encode import EncodedGroup
from dpo_core.models.model import load_policy, load_tokenizer, merge_adapter
from dpo_core.plan.inputs import Shapes
from dpo_core.policy.scorer import Scorer, score_reference
from dpo_core.training.trainer import train
from tests.dpo_core import conftest

CONFIG = TrainConfig(optim=Optim(learning_rate=1e-3), batch_size=4, n_epochs=1, max_length=64, checkpoint_steps=1)
# Where an architecture has these; others have their own names.
SIZES: dict[str, Any] = conftest.SIZES | {
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "sliding_window": 6,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
}


def tiny(family: str) -> PreTrainedModel:
    own = FAMILIES[family]
    known = AutoConfig.for_model(family)
    sizes = {name: value for name, value in SIZES.items() if getattr(known, name, None) is not None}
    sizes = {name: value for name, value in (sizes | own).items() if value is not None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
    for parameter in model.parameters():  # whatever starts at 0 would not show
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def save_tiny(family: str, folder: Path) -> Shapes:
    """Writes a tiny model of the family to the folder, and returns the shapes of its weights, by their names in the
    file."""
    tiny(family).save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        weights = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return Shapes({"model_type": family}, weights)


MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_d_state": 8}
ENCODERS_HALF = {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "encoder_layers": 1,
}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
LATENT = {"num_key_value_heads": 4, "rope_interleave": False}
FOUR_LAYERS = {"num_hidden_layers": 4}
# What a family needs beside SIZES.
FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {"num_dense_layers": 1},
    "apertus": {},
    "arcee": {},
    "aria_text": {},
    "axk1": LATENT,
    "bamba": MAMBA,
    "bart": ENCODERS_HALF,
    "bert": {},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "cohere": {},
    "cohere2": {},
    "cohere2_moe": {},
    "ctrl": {"n_embd": 32, "dff": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "cwm": {},
    "deepseek_v2": LATENT | {"topk_method": "greedy", "num_experts_per_tok": 2},
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT | {"index_topk": 4},
    "deepseek_v4": {},
    "diffllama": {},
    "doge": {},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": {},
    "exaone_moe": {},
    "falcon": {"head_dim": None, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.4},
    "falcon_mamba": {},
    "flex_olmo": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT | {"index_topk": 4},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 6},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gpt_oss": {},
    "gptj": {"rotary_dim": 8},
    "granite": {"logits_scaling": 4.0},
    "granite_swa": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": MAMBA,
    "granitemoeshared": {},
    "helium": {},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hy_v3": {},
    "hy_v4": LATENT | {"index_topk": 4},
    "hyperclovax": {"logits_scaling": 0.25},
    "inkling_text": {},
    "jais2": {},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "jetmoe": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama": {},
    "llama4_text": FOUR_LAYERS | {"intermediate_size_mlp": 64, "attention_chunk_size": 8, "floor_scale": 4},
    "longcat_flash": LATENT | {"num_layers": 2, "zero_expert_num": 2},
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "mellum": {},
    "mimo_v2_flash": {},
    "minicpm3": LATENT | {"dim_model_base": 8},
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "ministral": {"head_dim": 8},
    "ministral3": {},
    "mistral": {},
    "mixtral": {},
    "modernbert-decoder": {"local_attention": 8},
    "moshi": {},
    "mpt": {},
    "nanochat": {},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmo_hybrid": {},
    "olmoe": {},
    "openai-gpt": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {},
    "qwen3_5_moe_text": FOUR_LAYERS | DELTA,
    "qwen3_5_text": FOUR_LAYERS | DELTA,
    "qwen3_moe": {},
    "qwen3_next": FOUR_LAYERS | DELTA,
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 6, "lru_width": 32},
    "rwkv": {},
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {},
    "stablelm": {},
    "starcoder2": {},
    "trocr": {},
    "vaultgemma": {},
    "xglm": {},
    "xlstm": {"v_head_dim": None},
    "youtu": LATENT,
    "zaya": {"num_experts_per_tok": 1},
}


@dataclass(frozen=True)
class Found:
    """Records what the engine can do with a family of models."""

    prompts: str  # how completions get at theirs
    reason: str = ""  # why not faster, or why the family is refused
    adapted: str = ""  # the layers that the default adapter is put on
    balanced: bool = False  # whether training balances the experts


def examine(family: str) -> Found:
    """Tries a family, and returns what the engine can do with it.

    Raises AssertionError if a result is wrong. Errors that the engine raises, other than refusals, are passed on.
    """
    with TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        tiny(family).save_pretrained(base)
        conftest.build_tokenizer().save_pretrained(base)
        policy = load_policy(base)
        try:
            scorer = Scorer(policy)
        except ValueError as refusal:
            return Found("refused", str(refusal))
        groups = conftest.build_groups(4, 2)
        with torch.no_grad():
            _assert_close(scorer.token_logps(scorer.collate(groups))[0], _plain(policy, groups))
        groups = score_reference(policy, groups, max_tokens_per_pack=256)
        _train(base, groups, Path(folder) / "whole", adapter=None)
        _train(base, groups, Path(folder) / "adapter", adapter=Lora(r=2))
        adapted = load_policy(base, adapter=Lora(r=2))
        found = cast(Any, adapted).peft_config["default"]
        targets = {name.rpartition(".")[2] for name in found.target_modules} | set(found.target_parameters or ())
        prompts = "shared" if scorer.shares_prompts else "behind copies" if scorer.takes_batches else "one at a time"
        reason, balanced = scorer.manner.no_batches or scorer.manner.no_sharing, scorer.manner.experts is not None
        return Found(prompts, reason, ", ".join(sorted(targets)), balanced)


def _train(base: Path, groups: list[EncodedGroup], folder: Path, *, adapter: Lora | None) -> None:
    """Trains two steps, and asserts that the last checkpoint loads as the trained model.

    It also asserts that a run that resumes from the first checkpoint repeats the second step.
    """

    def run(name: str, resume: Path | None = None) -> PreTrainedModel:
        torch.manual_seed(0)
        policy = load_policy(base, adapter=adapter)
        for result in train(
            CONFIG, policy, tokenizer, [groups] * 2, total_steps=2, checkpoint_dir=folder / name, resume=resume
        ):
            assert result.metrics["grad_norm"] > 0
        return policy

    tokenizer = load_tokenizer(base)
    policy = run("run")
    resumed = run("again", resume=folder / "run" / "step-000001")
    for (name, ours), (_, theirs) in zip(resumed.named_parameters(), policy.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), f"{name} is another after resuming"
    saved = folder / "run" / "step-000002" / "model"
    if adapter is not None:
        for name, weight in policy.named_parameters():
            assert "lora_B" not in name or weight.any(), f"{name} has not learned"
        merge_adapter(saved, folder / "merged")
        saved = folder / "merged"
    with torch.no_grad():
        _assert_close(_plain(load_policy(saved), groups), _plain(policy, groups))


def _plain(policy: PreTrainedModel, groups: list[EncodedGroup]) -> Tensor:
    """Returns token log-probabilities that transformers alone computes, in one forward pass for each full sequence."""
    found = []
    for group in groups:
        for completion in group.completion_ids:
            ids = torch.tensor([[*group.prompt_ids, *completion]])
            logps = policy(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            found.append(logps.gather(1, ids[0, 1:, None])[len(group.prompt_ids) - 1 :, 0])
    return torch.cat(found)


def _assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


HEAD = """# Models

<!-- Printed by `python -m tests.dpo_core.models.families`; tests/dpo_core/models/test_families.py compares. -->

A test made a tiny model of each family of decoders in transformers {version}. It loaded the model from a folder, scored
rows and compared them with transformers' own forward of each sequence, trained it for two steps whole and two with the
default adapter, and saved, loaded, merged and resumed it. Other families were not tried; the service probes them in the
same way when it loads them.

**Prompts** says how completions read their prompt. *shared*: each prompt is computed once. *behind copies*: each
completion has its own copy, in padded batches. *one at a time*: each completion is a forward of the model's own.
*refused*: the family is not trained. Checkpoints of a family may differ: a cap of attention, a window that is in the
mask alone, or positions that stretch with the text end the sharing. **Adapter** names the linear layers, or stacked
weights of experts, that `Lora()` adapts by default.

**Balanced** says whether the [load-balancing loss](objectives.md#mixtures-of-experts) of a mixture of experts is added.
It is, if transformers defines it for the family, and the config's `router_aux_loss_coef` is not 0.

| Family | Prompts | Why | Adapter | Balanced |
|---|---|---|---|---|
"""


def row(family: str, found: Found) -> str:
    reason = re.sub(r"( by [\d.e+-]+|^ValueError: )", "", found.reason).partition(";")[0].rstrip(".").replace("|", "/")
    adapted = ", ".join(f"`{name}`" for name in found.adapted.split(", ") if name)
    return f"| {family} | {found.prompts} | {reason} | {adapted} | {'yes' if found.balanced else ''} |\n"


def main() -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    disable_progress_bar()
    sys.stdout.write(HEAD.format(version=transformers.__version__))
    for family in FAMILIES:
        sys.stdout.write(row(family, examine(family)))


if __name__ == "__main__":
    main()
