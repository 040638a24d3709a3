"""Saves models into folders that transformers and vLLM can load."""

import logging
from collections import OrderedDict
from collections.abc import Callable
from copy import copy, deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import (
    AUDIO_TOKENIZER_NAME,
    FEATURE_EXTRACTOR_NAME,
    GENERATION_CONFIG_NAME,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
    cached_file,
)

logger = logging.getLogger(__name__)

# The files that say how images and sounds become inputs; a multimodal model cannot be served without these files.
OF_PROCESSORS = (
    FEATURE_EXTRACTOR_NAME,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
    AUDIO_TOKENIZER_NAME,
    "chat_template.json",
)


def save_model(
    model: PreTrainedModel,
    folder: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    files: dict[str, bytes],
    **options: Any,
) -> None:
    """Writes three things into `folder`: the model, its tokenizer, and `files`, which maps the names of more files to
    their contents. `options` are arguments of transformers' `save_pretrained`.

    The generation config is written unchanged, as it was loaded, because transformers refuses to save some configs that
    it loads.
    """
    saved = copy(model)  # because the model itself may be in use
    if model.can_generate():
        saved.generation_config = GenerationConfig()
    saved.save_pretrained(folder, **options)
    if model.can_generate():
        model.generation_config.to_json_file(Path(folder, GENERATION_CONFIG_NAME), keys_to_pop=["compile_config"])
    tokenizer.save_pretrained(folder)
    for name, content in files.items():
        Path(folder, name).write_bytes(content)


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a copy of the model's structure without weights. Another thread can save a model with this copy while the
    model itself is in use.

    The model itself cannot be saved meanwhile, because it changes in every forward pass: some of PEFT's layers replace
    modules, and `dpo_core.policy.attention` changes the config.
    """
    copies: dict[int, Any] = {}

    def bare(tensor: Tensor) -> Tensor:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    def copied(part: Any, make: Callable[[Any], Any]) -> Any:
        if part is not None and id(part) not in copies:
            copies[id(part)] = make(part)
        return part if part is None else copies[id(part)]

    def of_module(module: nn.Module) -> nn.Module:
        twin = object.__new__(type(module))  # `copy` would create a new sharded module
        vars(twin).update(vars(module))
        twin._parameters = {name: copied(tensor, bare) for name, tensor in module._parameters.items()}
        twin._buffers = {name: copied(tensor, bare) for name, tensor in module._buffers.items()}
        twin._modules = {name: copied(child, of_module) for name, child in module._modules.items()}
        # FSDP's hook would split the model's own weights again, while another thread computes with them.
        twin._state_dict_pre_hooks = OrderedDict()
        return twin

    copied_model = cast(PreTrainedModel, of_module(model))
    copied_model.config = deepcopy(model.config)
    return copied_model


def processors_of(model: PreTrainedModel) -> dict[str, bytes]:
    """Returns the files that say how the model turns images and sounds into inputs, as a dictionary from names to
    contents. Reads the files from the folder or hub id from which the model was loaded. If this folder or hub id is not
    there any more, logs a warning and returns an empty dictionary."""
    if not model.name_or_path:
        return {}
    try:
        paths = {name: _find(model, name) for name in OF_PROCESSORS}
    except OSError as error:  # name_or_path is neither a folder nor a hub id
        logger.warning(
            "The model's files for images and sound, if it has any, were not found and are not copied: %s", error
        )
        return {}
    return {name: Path(path).read_bytes() for name, path in paths.items() if path}


def _find(model: PreTrainedModel, name: str) -> str | None:
    """Returns the path of the file `name` in the model's folder or in the hub's local cache; None if there is no such
    file."""
    path: str | None = cached_file(
        model.name_or_path,
        name,
        _commit_hash=getattr(model.config, "_commit_hash", None),
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return path
