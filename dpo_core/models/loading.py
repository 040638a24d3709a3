"""Loads models from folders or hub ids. Refuses a model whose weights are not exactly those that its config asks
for."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    Mxfp4Config,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, find_adapter_config_file

from dpo_core.models.architecture import UnusableModel, decoder_layers, is_reward_model, kind_of, local_part


@dataclass(frozen=True)
class Found:
    """Describes a checked model: its folder or hub id (`source`), its config, and the arguments with which transformers
    loads it."""

    kind: Any  # a model class of transformers, or an auto class
    source: str | Path
    config: PretrainedConfig
    dtype: torch.dtype | str
    names: dict[str, str] | None = None  # patterns that rename weights
    quantization: Mxfp4Config | None = None  # makes transformers convert a model in MXFP4 to full precision
    more: dict[str, Any] = field(default_factory=dict)  # further arguments of `from_pretrained`


def find(kind: Any, source: str | Path, *, dtype: torch.dtype | str, **options: object) -> Found:
    """Checks the model in the folder or of the hub id `source` without reading a weight, and returns what is needed to
    load the model. `kind` is an auto class of transformers, such as AutoModelForCausalLM; `options` change the model's
    config.

    A model may be in full precision or in MXFP4. Raises UnusableModel for:

    - a model that is quantized in another format
    - a model that transformers cannot train on texts
    - a model whose pad_token_id is not in the vocabulary
    - a folder that holds an adapter
    - a folder that holds the weights twice: in one safetensors file, and in several files with an index
    """
    if find_adapter_config_file(source) is not None:  # transformers would load the adapter's base and freeze it
        raise UnusableModel(
            f"{source} holds an adapter, not a whole model; merge the adapter into its base with merge_adapter first."
        )
    if all(Path(source, name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        both = f"{SAFE_WEIGHTS_NAME} and {SAFE_WEIGHTS_INDEX_NAME}"  # transformers reads the first, vLLM the second
        raise UnusableModel(f"{source} holds weights twice, in {both}; remove one of the two files.")
    composite = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
    config, names = _of_texts(composite, kind, source)
    _make_ready(config, source)
    return Found(kind, source, config, dtype, names, _expansion(composite, source))


def read(found: Found) -> PreTrainedModel:
    """Loads a model on the CPU, and checks its weights. `found` is what `find` returned for the model. Raises
    UnusableModel if the names or shapes of the weights do not match the config, or if a weight is NaN or infinite."""
    source = found.source
    try:
        model, report = found.kind.from_pretrained(
            source,
            config=found.config,
            dtype=found.dtype,
            quantization_config=found.quantization,
            key_mapping=found.names,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # weights of other shapes are refused below, with a remedy
            output_loading_info=True,
            **found.more,
        )
    except (FileNotFoundError, SafetensorError) as error:
        raise UnusableModel(f"The weights of {source} cannot be read ({error}); download them again.") from None
    _check_weights(model, report, source)
    _check_finite(model, source)
    _correct_tying(model)
    if found.quantization is not None:  # expanded weights are in bfloat16, whatever the dtype of the others
        model.to(model.dtype)
    return cast(PreTrainedModel, model)


def _make_ready(config: PretrainedConfig, source: str | Path) -> None:
    """Removes from a loaded config the settings with which its model was last run, such as the kind of attention.
    Raises UnusableModel for a pad_token_id outside the vocabulary; `source` names the model in the error."""
    text = config.get_text_config()
    # None selects SDPA if the architecture supports it. SDPA ignores a cap of attention's scores.
    config._attn_implementation = "eager" if getattr(text, "attn_logit_softcapping", None) else None
    for part in (config, text):
        part.output_attentions = part.output_hidden_states = False
        part.return_dict = True
    padding, vocabulary = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(padding, int) and vocabulary and padding >= vocabulary:
        what = f"config.json of {source} has pad_token_id {padding}, but the vocabulary has only {vocabulary} tokens"
        raise UnusableModel(f"{what}; set pad_token_id to a token of the vocabulary or to null.")


def _expansion(config: PretrainedConfig, source: str | Path) -> Mxfp4Config | None:
    """Returns the option that makes transformers convert a model in MXFP4 to full precision; None for a model that is
    not quantized. The option is needed for gpt-oss, which is published only in MXFP4.

    Raises UnusableModel for a model that is quantized in another way; `source` names the model in the error.
    """
    quantized = getattr(config, "quantization_config", None)
    if not quantized:
        return None
    method = quantized.get("quant_method", "of an unnamed method")
    if method != "mxfp4":
        raise UnusableModel(
            f"{source} is a quantized model ({method}), which cannot be trained; "
            "train the full-precision model it was made from."
        )
    return Mxfp4Config(dequantize=True)


def _of_texts(config: PretrainedConfig, kind: Any, source: str | Path) -> tuple[Any, dict[str, str] | None]:
    """Returns two values for loading a model for text only, without its image parts:

    - the config
    - patterns that rename the weights in the model's folder; None if no weight must be renamed

    transformers cannot load some multimodal models for text only. For such a model, the config is that of the text
    model within it, and the patterns give the weights the names that the text model expects. `kind` is an auto class of
    transformers, such as AutoModelForCausalLM. `source` names the model in errors.
    """
    loadable = (
        MODEL_FOR_CAUSAL_LM_MAPPING if kind is AutoModelForCausalLM else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    )
    if type(config) in loadable:
        return config, None
    text = config.get_text_config(decoder=True)
    if text is config or type(text) not in loadable:
        raise UnusableModel(
            f"{source} has the model type {config.model_type}, which transformers cannot train on texts; "
            "choose another model."
        )
    text.tie_word_embeddings = config.tie_word_embeddings
    return text, _NAMES_OF_TEXTS


# Prefixes of weights in a multimodal model, as transformers has written them since release 4.52, and before.
_NAMES_OF_TEXTS = {
    r"^model\.language_model\.": "model.",
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}


def _check_weights(model: PreTrainedModel, report: dict[str, Any], source: str | Path) -> None:
    """Raises UnusableModel unless the weights in the model's folder are exactly those of the model. transformers draws
    missing weights at random and ignores unknown ones. `report` is what transformers says about loading, and `source`
    names the model in the error."""
    wanted = f"the {type(model).__name__} that its config.json describes"
    remedy = "use weights and a config.json of the same model."
    for name, shape, expected in sorted(report["mismatched_keys"]):
        if name == "score.weight":
            remedy = f"load the model with num_outputs={shape[0]}."
        what = f"In {source} the weight {name} has the shape {tuple(shape)}, but {wanted} needs {tuple(expected)}"
        raise UnusableModel(f"{what}; {remedy}")
    new_head = "score.weight" if is_reward_model(model) else None
    if missing := sorted(set(report["missing_keys"]) - {new_head}):
        what = f"{source} lacks {len(missing)} weights, such as {missing[0]}, of {wanted}"
        raise UnusableModel(f"{what}; {remedy}")
    if strangers := _missed(report["unexpected_keys"], model):
        what = f"{source} has {len(strangers)} weights, such as {strangers[0]}, that do not belong to {wanted}"
        raise UnusableModel(f"{what}; {remedy}")


def _check_finite(model: PreTrainedModel, source: str | Path) -> None:
    for name, weight in model.named_parameters():
        if not torch.isfinite(local_part(weight)).all():
            raise UnusableModel(
                f"The weight {name} of {source} contains NaN or infinity; use an earlier checkpoint of this model."
            )


# Parts of the names of tables that architectures once saved with the weights and now compute.
_TABLES = ("rotary_emb.", ".inv_freq", ".masked_bias", ".causal_mask", ".attn.bias", ".attention.bias")


def _missed(names: Iterable[str], model: PreTrainedModel) -> list[str]:
    """Returns those of `names` that belong to the model's layers or to a reward model's head. `names` are
    the names of weights in the model's folder that transformers did not load.

    The result leaves out weights that training on texts does not use: those of image encoders, and those of multi-token
    prediction (extra layers after the last one, which predict tokens beyond the next).
    """
    config = model.config.get_text_config()
    first_further: int = getattr(config, "num_hidden_layers", 0)
    further = range(first_further, first_further + (getattr(config, "num_nextn_predict_layers", None) or 0))
    repeated = {type(layer) for layer in decoder_layers(model)}
    layers = {kind_of(name) for name, module in model.named_modules() if type(module) in repeated}
    prefixes = ("score.", *(f"{layer}." for layer in layers))

    def is_missed(name: str) -> bool:
        number = re.search(r"\.(\d+)\.", name)
        is_further = number is not None and int(number[1]) in further
        return kind_of(name).startswith(prefixes) and not is_further and not any(table in name for table in _TABLES)

    return sorted(filter(is_missed, names))


def _correct_tying(model: PreTrainedModel) -> None:
    """Sets the option tie_word_embeddings in the model's config to false if the head and the embeddings are two
    weights, because vLLM reads this option.

    If the folder holds two weights with different values, transformers loads both, even if the config says that they
    are one.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    for config in (model.config, model.config.get_text_config()):
        if head is not None and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = head.weight is cast(nn.Module, embeddings).weight
