"""Loads models to train (policies, with or without an adapter, and reward models) and tokenizers from Hugging Face
folders.

Weights are read only from safetensors, and code that comes with a model is never run.
"""

import logging
import warnings
from collections.abc import Iterator, Set
from contextlib import contextmanager
from copy import deepcopy
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
    PreTrainedTokenizerFast,
)

from dpo_core.config import Lora, Quantization
from dpo_core.models.adapter import attach, check_base, fingerprint, options_of, put_weights, quantization_of
from dpo_core.models.adapter_folder import base_of
from dpo_core.models.architecture import UnusableModel, count_outputs, is_reward_model
from dpo_core.models.folder import processors_of, save_model
from dpo_core.models.loading import Found, find, read
from dpo_core.models.parts import NeedsWeights, load_structure
from dpo_core.models.quantization import quantize, round_to_nf4
from dpo_core.options import InvalidOption, Objective

logger = logging.getLogger(__name__)
CACHED_WORDS = 100_000  # words whose ids a tokenizer caches; the default, 10,000, takes up to a quarter longer


def load_policy(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    adapter: Lora | Path | None = None,
    quantization: Quantization | None = None,
    seed: int = 0,
    in_parts: bool = False,
) -> PreTrainedModel:
    """Loads a causal language model from a Hugging Face folder or hub id, ready to train. Its dropout is off. `dtype`
    is the dtype of its weights.

    With an `adapter`, all weights but the adapter's are frozen. `adapter` is either the options of a new adapter, or
    the folder of a trained adapter that training continues. `seed` decides the first weights of a new adapter. With
    `quantization`, the frozen base (the model under the adapter) is in NF4, and its products are computed in `dtype`. A
    multimodal model for which transformers has no class for texts is loaded as its text model. A model in MXFP4 is
    converted to full precision.

    With `in_parts`, the model has no weights at first. `train` later divides the model over ranks (the processes of the
    run), and each rank then reads only its part. All ranks must be able to read `source`. A model that cannot be loaded
    in this way is loaded whole, with a warning.

    Raises InvalidOption for:

    - target modules that the model does not have, or whose adapters would not learn
    - a quantization without an adapter, or of a model that cannot be quantized

    Raises ValueError for:

    - the dtype float16
    - a model that is stored quantized in another format than MXFP4
    - a `source` that holds an adapter
    - a folder whose weights and config do not match
    """
    check_dtype(dtype)
    return _load(AutoModelForCausalLM, source, dtype, device, adapter, seed, quantization, in_parts)


def load_reward_model(
    source: str | Path,
    *,
    num_outputs: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    adapter: Lora | Path | None = None,
    quantization: Quantization | None = None,
    seed: int = 0,
    in_parts: bool = False,
) -> PreTrainedModel:
    """Loads a reward model: a language model with a linear head for rewards in place of the vocabulary's head. If
    `source` has no such head, the head's weights are drawn at random with the seed `seed`.

    `num_outputs` is the number of the head's outputs: 1 for the reward, or 2 for `reward_gaussian`, the mean and the
    logarithm of the variance. The config says regression, so vLLM's `LLM(folder, runner="pooling").classify(prompts)`
    returns the outputs unchanged and not as probabilities. A `source` that is the folder of an adapter is refused;
    merge the adapter into its base first. The other arguments mean the same as in `load_policy`.
    """
    check_dtype(dtype)
    return _load(
        AutoModelForSequenceClassification,
        source,
        dtype,
        device,
        adapter,
        seed,
        quantization,
        in_parts,
        **_regression(num_outputs),
    )


def _regression(num_outputs: int) -> dict[str, object]:
    return {"num_labels": num_outputs, "problem_type": "regression"}


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer from a Hugging Face folder or hub id."""
    tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(source, trust_remote_code=False))
    words: Any = tokenizer.backend_tokenizer.model if isinstance(tokenizer, PreTrainedTokenizerFast) else None
    if hasattr(words, "_resize_cache"):
        words._resize_cache(CACHED_WORDS)
    return tokenizer


def _load(
    kind: Any,
    source: str | Path,
    dtype: torch.dtype | str,
    device: str | torch.device,
    adapter: Lora | Path | None,
    seed: int,
    quantization: Quantization | None,
    in_parts: bool,
    **options: object,
) -> PreTrainedModel:
    if quantization and adapter is None:
        message = (
            f"The option 'quantization' is '{quantization}', whose weights cannot be trained; "
            "add an adapter, or leave 'quantization' out."
        )
        raise InvalidOption("quantization", message)
    with torch.random.fork_rng([]):  # new weights are drawn on the CPU
        torch.default_generator.manual_seed(seed)
        found = find(kind, source, dtype=dtype, **options)
        if in_parts and (structure := _structure(found, device, adapter, quantization, seed)):
            return structure
        whole = read(found).eval()
        model = quantize(whole, device) if quantization else whole.to(device)
        if adapter is not None:
            rewards = is_reward_model(model)
            # A new head is trained whole.
            attach(
                model,
                adapter if isinstance(adapter, Lora) else options_of(adapter),
                task_type="SEQ_CLS" if rewards else "CAUSAL_LM",
                trained_whole=["score"] if rewards else None,
            )
    if isinstance(adapter, Path):
        put_weights(model, adapter)
        check_base(adapter, model)
    return model


def _structure(
    found: Found, device: str | torch.device, adapter: Lora | Path | None, quantization: Quantization | None, seed: int
) -> PreTrainedModel | None:
    """Returns the model that `found` describes, without weights; each rank (process of the run) later reads only its
    part of the weights. If the model must be loaded whole, logs a warning and returns None. The other arguments mean
    the same as in `load_policy`."""
    try:
        if quantization:
            raise NeedsWeights(f"its layers are rounded to {quantization}")
        return load_structure(found, device, adapter)
    except NeedsWeights as reason:
        logger.warning("%s is loaded whole on every rank: %s.", found.source, reason)
        torch.default_generator.manual_seed(seed)
        return None


def has_adapter(model: PreTrainedModel) -> bool:
    return bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Turns off the adapter that is being trained, until the `with` block ends. In the block the policy computes the
    same as its reference, the model from which training started. An adapter that is frozen stays on."""
    if not has_adapter(model) or not any(parameter.requires_grad for parameter in model.parameters()):
        yield
        return
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def merge_adapter(adapter: Path, folder: Path, *, base: str | Path | None = None, dtype: str = "auto") -> None:
    """Merges a trained adapter into its base (the model under it), and writes the merged model into a Hugging Face
    folder.

    If `base` is None, the adapter's `adapter_config.json` names the base. `dtype` is the dtype of the merged weights,
    in transformers' spelling; auto means the dtype of the base. Raises ValueError if the adapter was not trained on
    this base, or if `folder` is the adapter's own folder.
    """
    if folder.resolve() == adapter.resolve():
        raise ValueError(f"{folder} is the adapter's own folder; name another folder for the merged model.")
    merged = load_merged(adapter, base=base, dtype=dtype)
    save_model(merged, folder, agree_on_padding(merged, load_tokenizer(adapter)), processors_of(merged))


def load_merged(
    adapter: Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """Loads a trained adapter and its base (the model under it), merged into one model that is ready to train.

    `base` is the folder or hub id of the base; None means the one that the adapter's config names. `dtype` is the dtype
    of the merged weights; auto means the dtype of the base. Each weight is merged in float32 and rounded to `dtype`
    once. Raises ValueError if the adapter does not fit the base.
    """
    both = load_attached(adapter, base=base, dtype=dtype, device=device)
    _merge_in_float32(both)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        return cast(PreTrainedModel, both.merge_and_unload()).requires_grad_(True).eval()


def _merge_in_float32(both: Any) -> None:
    """Merges each layer's adapter into the layer's weights, one layer after the other, so that only one layer at a time
    takes the memory of float32. `both` is the base model with the adapter on it, as a PeftModel."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in both.modules():
        if isinstance(layer, BaseTunerLayer):
            under = layer.get_base_layer()
            dtype = next(under.parameters()).dtype
            under.to(torch.float32)
            layer.merge()
            under.to(dtype)


def load_attached(
    adapter: Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
) -> Any:
    """Loads a trained adapter and its base (the model under it) as a PeftModel, without merging the two. `base` is the
    folder or hub id of the base; None means the one that the adapter's config names. If the base was quantized in
    training, its weights are rounded to the values that NF4 has, but keep the dtype `dtype`. Raises ValueError if the
    adapter does not fit the base."""
    from peft.utils import load_peft_weights

    source = base_of(adapter) if base is None else base
    if Path(source).is_absolute() and not Path(source).is_dir():
        what = f"The adapter in {adapter} was trained on the base in {source}, but that folder does not exist"
        raise ValueError(f"{what}; restore the folder, or give the place where the base is now, as the argument base.")
    weights = load_peft_weights(adapter, device="cpu")
    heads = [weight for name, weight in weights.items() if name.endswith(".score.weight")]
    kind = AutoModelForSequenceClassification if heads else AutoModelForCausalLM
    options = _regression(len(heads[0])) if heads else {}
    loaded = _load(kind, source, dtype, device, None, 0, None, False, **options)
    check_base(adapter, loaded.requires_grad_(False))
    if quantization_of(adapter):
        round_to_nf4(loaded)
    return _put_on(loaded, adapter, weights.keys()).eval()


def fingerprint_of(source: str | Path) -> str:
    """Returns the fingerprint (a digest that identifies a base model) of the model in a folder or of a hub id. The
    weights are read from mapped files and not copied into memory, unless transformers has to convert them. Raises
    ValueError for a model that cannot be loaded."""
    return fingerprint(_load(AutoModelForCausalLM, source, "auto", "cpu", None, 0, None, False).requires_grad_(False))


def _put_on(base: PreTrainedModel, adapter: Path, names: Set[str]) -> Any:
    """Returns the base with the saved adapter on it, as a PeftModel. `names` are the names of the adapter's saved
    weights. Raises ValueError for weights that do not fit the base; PEFT would leave them out, or draw them at
    random."""
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    what = f"The adapter in {adapter} does not fit the base {base.name_or_path}"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # missing keys are refused below
            both = PeftModel.from_pretrained(base, adapter)
    except RuntimeError as error:  # PyTorch raises RuntimeError for weights of other shapes
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{what} ({reason}); use the base that the adapter was trained on.") from None
    if strangers := sorted(names ^ get_peft_model_state_dict(both).keys()):
        raise ValueError(
            f"{what}, because their layers differ: {len(strangers)} weights, such as {strangers[0]}, exist only in one "
            "of the two; use the base that the adapter was trained on."
        )
    return both


def agree_on_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Returns the tokenizer to save with the model.

    A policy's tokenizer is returned unchanged. For a reward model the result is a copy whose padding token is not EOS,
    and the model's pad_token_id becomes this token. The reason is that transformers reads the reward of a text at the
    last token before padding.
    """
    if not is_reward_model(model):
        return tokenizer
    tokenizer = deepcopy(tokenizer)
    candidates = [tokenizer.pad_token, *tokenizer.all_special_tokens]
    usable = [token for token in candidates if token not in (None, tokenizer.eos_token)]
    if not usable:
        raise ValueError(
            f"The tokenizer has no padding token other than its end token {tokenizer.eos_token}; set its pad_token."
        )
    tokenizer.pad_token = usable[0]
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return tokenizer


def check_policy(model: nn.Module) -> None:
    """Raises UnusableModel for a model that this package cannot train: a model within a wrapper (such as a PeftModel),
    a model with several adapters, or a model with an adapter on its head."""
    if not isinstance(model, PreTrainedModel):
        remedy = (
            "pass the transformers model itself, or load one with an adapter by load_policy(folder, adapter=Lora())"
        )
        raise UnusableModel(f"The policy is a {type(model).__name__}, which is not a transformers model; {remedy}.")
    if has_adapter(model) and len(model.peft_config) > 1:
        names = ", ".join(model.peft_config)
        raise UnusableModel(
            f"The model has several adapters ({names}) but may have only one; delete the others with delete_adapter."
        )
    head = model.get_output_embeddings()
    if head is not None and hasattr(head, "base_layer"):
        raise UnusableModel(
            "The model has an adapter on its head, which would not be trained; leave the head out of target_modules."
        )


def check_dtype(dtype: torch.dtype) -> None:
    """Raises UnusableModel if the dtype is float16."""
    if dtype == torch.float16:
        raise UnusableModel("The dtype is 'float16', in which small gradients become 0; use 'bfloat16' or 'float32'.")


def check_model(model: nn.Module, objective: Objective) -> None:
    """Raises InvalidOption if the objective does not train a model of this kind (a language model, or a reward model
    with the right number of outputs). Raises UnusableModel if the model is in float16, or if all its weights are
    frozen."""
    for parameter in model.parameters():
        check_dtype(parameter.dtype)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        remedy = "set requires_grad to True on the weights that training may change"
        raise UnusableModel(f"All weights of the policy ({type(model).__name__}) are frozen; {remedy}.")
    wanted, present = objective.traits.num_outputs, count_outputs(model)
    if wanted != present:
        kinds = [f"a reward model of {n} output(s)" if n else "a causal language model" for n in (wanted, present)]
        remedy = f"load_reward_model with num_outputs={wanted}" if wanted else "load_policy"
        message = f"The objective '{objective.type}' trains {kinds[0]}, but the model is {kinds[1]}; use {remedy}."
        raise InvalidOption("objective", message)
