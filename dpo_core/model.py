"""Models from Hugging Face folders: policies, with or without an adapter, reward models, and tokenizers.

Weights come as safetensors only, and no code that travels with a model is run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dpo_core.config import Lora
from dpo_core.options import InvalidOption


def load_policy(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    adapter: Lora | None = None,
) -> PreTrainedModel:
    """A causal language model from a Hugging Face folder or hub id, ready to train: dropout is off.

    With an `adapter` all else is frozen. Raises InvalidOption where the model has none of its target modules.
    """
    return _load(AutoModelForCausalLM, source, dtype, device, adapter)


def load_reward_model(
    source: str | Path,
    *,
    num_outputs: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    adapter: Lora | None = None,
) -> PreTrainedModel:
    """The same weights with a linear head in place of the vocabulary's, new unless `source` is a reward model.

    A head has one output, the reward; for `reward_gaussian` two, its mean and the logarithm of its variance.
    """
    return _load(AutoModelForSequenceClassification, source, dtype, device, adapter, num_labels=num_outputs)


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(source, trust_remote_code=False))


def _load(
    kind: Any,
    source: str | Path,
    dtype: torch.dtype | str,
    device: str | torch.device,
    adapter: Lora | None,
    **options: int,
) -> PreTrainedModel:
    model = kind.from_pretrained(
        source, dtype=dtype, use_safetensors=True, trust_remote_code=False, attn_implementation="sdpa", **options
    )
    model.to(device).eval()
    if adapter is not None:
        _attach(model, adapter)
    return cast(PreTrainedModel, model)


def _attach(model: Any, adapter: Lora) -> None:
    from peft import LoraConfig
    from peft.utils.error import NoMatchingPeftModuleError

    targets = adapter.target_modules
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="SEQ_CLS" if is_reward_model(model) else "CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,
    )
    try:
        model.add_adapter(config)
    except NoMatchingPeftModuleError:
        message = (
            f"target_modules is {targets}, of which {type(model).__name__} has none; name some of its linear layers."
        )
        raise InvalidOption("target_modules", message) from None


def has_adapter(model: PreTrainedModel) -> bool:
    return bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Within, a policy with an adapter is its own reference."""
    if not has_adapter(model):
        yield
        return
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def merge_adapter(adapter: Path, folder: Path) -> None:
    """Write a trained adapter and the base that its `adapter_config.json` names as one Hugging Face folder."""
    from peft import PeftConfig, PeftModel

    config: Any = PeftConfig.from_pretrained(adapter)
    kind = AutoModelForSequenceClassification if config.task_type == "SEQ_CLS" else AutoModelForCausalLM
    base: Any = _load(kind, config.base_model_name_or_path, "auto", "cpu", None)
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    merged.save_pretrained(folder)
    load_tokenizer(adapter).save_pretrained(folder)


def is_reward_model(model: nn.Module) -> bool:
    return isinstance(getattr(model, "score", None), nn.Linear)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks that the architecture repeats."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]
