"""Models from Hugging Face folders: policies, with or without an adapter, reward models, and tokenizers.

Weights come as safetensors only, and no code that travels with a model is run.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Mxfp4Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import find_adapter_config_file

from dpo_core.adapter import attach, kind_of
from dpo_core.config import Lora
from dpo_core.folder import processors_of, save_model
from dpo_core.options import InvalidOption, Objective

WORDS_REMEMBERED = 100_000  # with their ids, by a tokenizer: with its own 10,000 text takes up to a quarter longer


def load_policy(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    adapter: Lora | None = None,
) -> PreTrainedModel:
    """A causal language model from a Hugging Face folder or hub id, ready to train: dropout is off.

    With an `adapter` all else is frozen. Raises InvalidOption where the model has none of its target modules, or they
    would not learn. Raises ValueError for float16, for a quantized model (one in MXFP4 is expanded), for a folder that
    holds an adapter, and where weights and config do not fit each other. Of a multimodal model that transformers loads
    for texts only as a part, that part is loaded.
    """
    check_dtype(dtype)
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
    It is marked as a regression, so that vLLM's `LLM(folder, runner="pooling").classify(prompts)` gives the outputs
    as they are; else vLLM makes probabilities of them. The folder of an adapter is refused; merge it first.
    """
    check_dtype(dtype)
    return _load(AutoModelForSequenceClassification, source, dtype, device, adapter, **_regression(num_outputs))


def _regression(num_outputs: int) -> dict[str, object]:
    return {"num_labels": num_outputs, "problem_type": "regression"}


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(source, trust_remote_code=False))
    words: Any = tokenizer.backend_tokenizer.model if isinstance(tokenizer, PreTrainedTokenizerFast) else None
    if hasattr(words, "_resize_cache"):
        words._resize_cache(WORDS_REMEMBERED)
    return tokenizer


def _load(
    kind: Any,
    source: str | Path,
    dtype: torch.dtype | str,
    device: str | torch.device,
    adapter: Lora | None,
    **options: object,
) -> PreTrainedModel:
    if find_adapter_config_file(source) is not None:  # transformers would load the base that it names, and freeze it
        raise ValueError(f"{source} holds an adapter; write it and its base as one folder with merge_adapter.")
    composite = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
    config, names = _of_texts(composite, kind, source)
    _make_ready(config, source)
    quantization = _expansion(composite, source)
    try:
        model, report = kind.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            quantization_config=quantization,
            key_mapping=names,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are refused below, in words
            output_loading_info=True,
        )
    except (FileNotFoundError, SafetensorError) as error:
        raise ValueError(f"The weights of {source} cannot be read ({error}); fetch them again.") from None
    _check_weights(model, report, source)
    _tell_tying(model)
    if quantization is not None:  # what was expanded is in bfloat16, whatever the others are in
        model.to(model.dtype)
    model.to(device).eval()
    _check_finite(model, source)
    if adapter is not None:
        rewards = is_reward_model(model)
        # A new head is trained whole.
        attach(
            model,
            adapter,
            task_type="SEQ_CLS" if rewards else "CAUSAL_LM",
            trained_whole=["score"] if rewards else None,
        )
    return cast(PreTrainedModel, model)


def _check_weights(model: PreTrainedModel, report: dict[str, Any], source: str | Path) -> None:
    """Raises ValueError where transformers would start weights at random, or leave some of the folder's out."""
    wanted, remedy = f"the {type(model).__name__} of its config.json", "use weights and a config of the same model."
    for name, found, expected in sorted(report["mismatched_keys"]):
        if name == "score.weight":
            remedy = f"give num_outputs={found[0]}."
        raise ValueError(f"{source} has {name} of shape {tuple(found)}, {wanted} wants {tuple(expected)}; {remedy}")
    new_head = "score.weight" if is_reward_model(model) else None
    if missing := sorted(set(report["missing_keys"]) - {new_head}):
        raise ValueError(f"{source} lacks {len(missing)} weights of {wanted}, such as {missing[0]}; {remedy}")
    if strangers := sorted(name for name in report["unexpected_keys"] if _would_be_missed(name, model)):
        what = f"{source} has {len(strangers)} weights, such as {strangers[0]}, that have no place in {wanted}"
        raise ValueError(f"{what}; {remedy}")


def _check_finite(model: PreTrainedModel, source: str | Path) -> None:
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name} of {source} holds numbers that are not finite; use an earlier checkpoint of it.")


# Parts of the names of tables that architectures once saved, and compute now.
_TABLES = ("rotary_emb.", ".inv_freq", ".masked_bias", ".causal_mask", ".attn.bias", ".attention.bias")


def _would_be_missed(name: str, model: PreTrainedModel) -> bool:
    """Whether a weight of a folder, for which the model has no place, is one of its layers or a reward model's head.
    Layers that predict further tokens, and towers for images, are not trained on texts."""
    if any(table in name for table in _TABLES):
        return False
    config = model.config.get_text_config()
    number = re.search(r"\.(\d+)\.", name)
    further = getattr(config, "num_nextn_predict_layers", None) or 0
    if number and 0 <= int(number[1]) - getattr(config, "num_hidden_layers", 0) < further:
        return False
    repeated = {type(layer) for layer in decoder_layers(model)}
    layers = {kind_of(name) for name, module in model.named_modules() if type(module) in repeated}
    return name.startswith("score.") or any(kind_of(name).startswith(f"{layer}.") for layer in layers)


def _tell_tying(model: PreTrainedModel) -> None:
    """transformers unties a head that differs from the embeddings in the folder; the config, which vLLM reads, says so
    from here on."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    for config in (model.config, model.config.get_text_config()):
        if head is not None and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = head.weight is cast(nn.Module, embeddings).weight


def _make_ready(config: PretrainedConfig, source: str | Path) -> None:
    """Undo what a folder's config says of how its model was last run. Raises ValueError for an id that cannot be."""
    config._attn_implementation = None  # SDPA where the architecture has it, whatever the folder was saved with
    text = config.get_text_config()
    for part in (config, text):
        part.output_attentions = part.output_hidden_states = False
        part.return_dict = True
    padding, vocabulary = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(padding, int) and vocabulary and padding >= vocabulary:
        what = f"{source} has the pad_token_id {padding}, outside its vocabulary of {vocabulary}"
        raise ValueError(f"{what}; give its config.json one of its tokens, or null.")


def _expansion(config: PretrainedConfig, source: str | Path) -> Mxfp4Config | None:
    """How quantized weights become whole ones: gpt-oss is published in MXFP4 alone. Others are refused."""
    quantized = getattr(config, "quantization_config", None)
    if not quantized:
        return None
    method = quantized.get("quant_method", "of an unnamed method")
    if method != "mxfp4":
        raise ValueError(
            f"{source} is a quantized model ({method}); train the one it was made from, in full precision."
        )
    return Mxfp4Config(dequantize=True)


def _of_texts(config: PretrainedConfig, kind: Any, source: str | Path) -> tuple[Any, dict[str, str] | None]:
    """The config to load, and how weights are renamed: those of a multimodal model of which transformers has
    no class for texts alone are loaded into the class of its text model."""
    loadable = (
        MODEL_FOR_CAUSAL_LM_MAPPING if kind is AutoModelForCausalLM else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    )
    if type(config) in loadable:
        return config, None
    text = config.get_text_config(decoder=True)
    if text is config or type(text) not in loadable:
        raise ValueError(
            f"{source} is of type {config.model_type}, for which transformers has no class to train on texts."
        )
    text.tie_word_embeddings = config.tie_word_embeddings
    return text, _NAMES_OF_TEXTS


# Of weights in a multimodal model, as transformers has written them since 4.52 and before.
_NAMES_OF_TEXTS = {
    r"^model\.language_model\.": "model.",
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}


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
    from peft.utils import load_peft_weights

    config: Any = PeftConfig.from_pretrained(adapter)
    heads = [weight for name, weight in load_peft_weights(adapter).items() if name.endswith(".score.weight")]
    kind = AutoModelForSequenceClassification if heads else AutoModelForCausalLM
    options = _regression(len(heads[0])) if heads else {}
    base: Any = _load(kind, config.base_model_name_or_path, "auto", "cpu", None, **options)
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    tokenizer = agree_on_padding(merged, load_tokenizer(adapter))
    save_model(merged, folder, tokenizer, processors_of(base))


def agree_on_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer to save beside a model. Beside a reward model it pads with a token that ends no text, and the
    model's config names that token: transformers reads the reward of a row at the last token that is another."""
    if not is_reward_model(model):
        return tokenizer
    tokenizer = deepcopy(tokenizer)
    candidates = [tokenizer.pad_token, *tokenizer.all_special_tokens]
    usable = [token for token in candidates if token not in (None, tokenizer.eos_token)]
    if not usable:
        raise ValueError(f"The tokenizer has nothing to pad with but {tokenizer.eos_token}; give it a pad_token.")
    tokenizer.pad_token = usable[0]
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return tokenizer


def count_outputs(model: nn.Module) -> int:
    """Of a reward model's head; 0: it is no reward model."""
    head = getattr(model, "score", None)
    head = getattr(head, "original_module", head)  # of which an adapter trains a copy
    return head.out_features if isinstance(head, nn.Linear) else 0


def is_reward_model(model: nn.Module) -> bool:
    return count_outputs(model) > 0


def check_policy(model: nn.Module) -> None:
    """Raises ValueError for what no scorer can read as one model: a wrapper of PEFT's, or an adapted head."""
    if not isinstance(model, PreTrainedModel):
        remedy = "load the base with load_policy(folder, adapter=Lora(...))"
        raise ValueError(f"{type(model).__name__} wraps a model, whose reference it would hide; {remedy}.")
    head = model.get_output_embeddings()
    if head is not None and hasattr(head, "base_layer"):
        raise ValueError(
            f"{type(model).__name__} has an adapter on its head, which would not be trained; leave it out."
        )


def check_dtype(dtype: torch.dtype) -> None:
    if dtype == torch.float16:
        raise ValueError("dtype is float16, in which small gradients vanish; use bfloat16 or float32.")


def check_model(model: nn.Module, objective: Objective) -> None:
    """Raises InvalidOption for a model of another kind than the objective trains, ValueError for one in float16."""
    for parameter in model.parameters():
        check_dtype(parameter.dtype)
    wanted, found = objective.traits.num_outputs, count_outputs(model)
    if wanted != found:
        kinds = [f"a reward model of {n} output(s)" if n else "a causal language model" for n in (wanted, found)]
        remedy = f"load_reward_model with num_outputs={wanted}" if wanted else "load_policy"
        message = f"objective is {objective.type}, which trains {kinds[0]}, not {kinds[1]}; use {remedy}."
        raise InvalidOption("objective", message)


def is_sharded(model: PreTrainedModel) -> bool:
    """Every forward is a joint work of all ranks then."""
    # Within a forward those of the root are whole, but the layers are gathered one by one.
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks that the architecture repeats."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]
