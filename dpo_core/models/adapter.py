"""Puts low-rank adapters (LoRA) on models, decides which layers get an adapter, and identifies the base of an adapter:
the model that is under it."""

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo_core.config import Lora
from dpo_core.models.adapter_folder import WEIGHTS
from dpo_core.models.architecture import UnusableModel, kind_of
from dpo_core.options import InvalidOption
from dpo_core.plan.adapters import ROUTERS

BEFORE_NF4 = "fingerprint_before_nf4"  # attribute of a quantized model: its fingerprint before it was quantized
BASE = "base_model.json"  # the file beside an adapter that identifies its base
SAMPLED = 64  # how many numbers of each weight are in a fingerprint


def attach(
    model: PreTrainedModel,
    adapter: Lora,
    *,
    task_type: str,
    trained_whole: list[str] | None = None,
    like: PreTrainedModel | None = None,
) -> None:
    """Puts a new adapter on the model. Freezes the model's own weights, except those of the modules that
    `trained_whole` names (None means no modules). `task_type` is PEFT's name for the model's task, such as CAUSAL_LM.

    A trial on a few tokens finds the layers that can have an adapter. If the model has no weights yet, the trial needs
    `like`, another model with weights and the same kinds of layers. Raises InvalidOption for target modules that the
    model does not have, or whose adapters would not learn.
    """
    from peft import LoraConfig

    linears = _linears(model, like or model)
    all_linear = adapter.target_modules == "all-linear"
    default = _names(model, _adaptable(model, linears)) + _experts(model)
    targets = default if all_linear else _as_asked_for(model, adapter.target_modules)
    if not targets:
        raise InvalidOption(
            "target_modules", f"{type(model).__name__} has no linear layer for an adapter; train all weights instead."
        )
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in linears),
        task_type=task_type,
        modules_to_save=trained_whole,
        base_model_name_or_path=model.name_or_path,
    )
    head = model.get_output_embeddings()
    try:
        with warnings.catch_warnings():
            # PEFT doubles the rank of experts by a name pattern, and then warns that nothing matches the pattern.
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
            model.add_adapter(config)
    except ValueError as error:  # PEFT raises ValueError for modules that are missing or cannot be adapted
        raise InvalidOption("target_modules", _refusal(model, targets, error)) from None
    _check_targets(model, linears, head)


def fingerprint(model: nn.Module) -> str:
    """Returns a digest that identifies a base model, the model under an adapter. The digest is the same with and
    without an adapter on the model, and in any precision, also in NF4.

    The digest covers some numbers of each frozen weight, but not the weights of the head. The reason is that a reward
    model may continue to train the adapter of a policy, and has another head than the policy. The names of weights do
    not count, because releases of transformers rename weights. If the model is sharded, all ranks (processes of the
    run) must call this function together; only one weight at a time is gathered from all ranks.
    """
    if before := getattr(model, BEFORE_NF4, None):
        return str(before)
    head = {id(weight) for weight in _head_weights(model)}
    samples = [
        whole(weight).flatten()[:: weight.numel() // SAMPLED | 1][:SAMPLED].bfloat16()
        for name, weight in model.named_parameters()
        if not weight.requires_grad and "score." not in name and id(weight) not in head
    ]
    parts = torch.split(torch.cat(samples).cpu().view(torch.int16), [len(sample) for sample in samples])
    return hashlib.sha256(b"".join(sorted(part.numpy().tobytes() for part in parts))).hexdigest()


def whole(weight: Tensor) -> Tensor:
    """Returns the weight as one whole tensor, detached from autograd. If the weight is sharded, its shards are
    gathered, so all ranks (processes of the run) must call this function together."""
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach()


def _head_weights(model: Any) -> list[nn.Parameter]:
    """Returns the weights of the model's head over the vocabulary, without those that the embeddings share."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return [weight for weight in head.parameters() if weight is not embeddings.weight] if head is not None else []


def base_file(base: str, model: nn.Module) -> bytes:
    """Returns the contents of base_model.json, a file beside a saved adapter that identifies the base: the model under
    the adapter. The contents are a JSON object. Its key `sha256_of_samples` holds `base`, the fingerprint of this
    model. If the base of `model` is in NF4, the key `quantization` holds "nf4"."""
    quantization = {"quantization": "nf4"} if hasattr(model, BEFORE_NF4) else {}
    return json.dumps({"sha256_of_samples": base, **quantization}).encode()


def quantization_of(folder: Path) -> str | None:
    """Returns how the model under the adapter in `folder` was quantized during training, such as nf4; None if it was
    not quantized."""
    file = folder / BASE
    return json.loads(file.read_bytes()).get("quantization") if file.is_file() else None


def saved_base(folder: Path) -> str | None:
    """Returns the fingerprint of the model (the base) on which the adapter in `folder` was trained; None if the folder
    holds no fingerprint."""
    file = folder / BASE
    return str(json.loads(file.read_bytes())["sha256_of_samples"]) if file.is_file() else None


def has_learned(folder: Path) -> bool:
    """Whether the adapter saved in `folder` changes the model that it is put on. The B matrices of a new LoRA adapter
    are zero, so a new adapter changes nothing. Raises UnusableModel if a weight of the adapter is NaN or infinite."""
    weights = load_file(folder / WEIGHTS)
    if broken := sorted(name for name, weight in weights.items() if not weight.isfinite().all()):
        what = f"The adapter in {folder} has NaN or infinite values, such as in {broken[0]}"
        raise UnusableModel(f"{what}; use an earlier checkpoint, or train a new adapter.")
    return any(bool(weight.any()) for name, weight in weights.items() if ".lora_A." not in name)


def check_base(folder: Path, model: PreTrainedModel) -> None:
    """Raises UnusableModel if the adapter in `folder` was trained on a base (the model under it) whose weights have
    other values than those of `model`. Does nothing if no file in the folder identifies the base on which the adapter
    was trained. Folders that other programs have written have no such file."""
    saved = saved_base(folder)
    if saved and saved != fingerprint(model):
        what = f"The adapter in {folder} was trained on a base whose weights differ from those of {model.name_or_path}"
        raise UnusableModel(f"{what}; restore the base's earlier weights, or train a new adapter.")


def dropouts(model: nn.Module) -> list[nn.Module]:
    """Returns the dropout layers of the model's adapter whose dropout rate is not 0."""
    return [
        layer
        for name, layer in model.named_modules()
        if ".lora_dropout." in name and isinstance(layer, nn.Dropout) and layer.p
    ]


def options_of(folder: Path) -> Lora:
    """Returns the options of the adapter saved in `folder`. Raises UnusableModel if the adapter is not a LoRA adapter,
    or if it has trained biases."""
    from peft import LoraConfig, PeftConfig

    config = PeftConfig.from_pretrained(folder)
    if not isinstance(config, LoraConfig) or config.bias != "none":
        raise UnusableModel(
            f"The adapter in {folder} is not a LoRA adapter, or has biases, which are not supported; "
            "merge the adapter into its base, and train the merged model."
        )
    targets = config.target_modules
    names = {targets} if isinstance(targets, str) else set(targets or ())
    return Lora(
        r=config.r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        target_modules=tuple(sorted(names | set(config.target_parameters or ()))),
    )


def put_weights(model: Any, folder: Path) -> None:
    """Loads the weights of the adapter saved in `folder` into the model's adapter. A reward model keeps its own new
    head if the saved adapter was trained on a policy, which has no such head. Raises UnusableModel if the names or
    shapes of the saved weights differ from those of the model's adapter."""
    from peft import set_peft_model_state_dict
    from peft.utils import get_peft_model_state_dict

    saved = {_model_name(name): weight for name, weight in load_file(folder / WEIGHTS).items()}
    own = get_peft_model_state_dict(model)
    if not any("score." in name for name in saved):  # a policy's adapter
        saved |= {name: weight for name, weight in own.items() if "score." in name}
    strangers = sorted(saved.keys() ^ own.keys())
    if strangers:
        what = (
            f"The adapter in {folder} does not fit the model: {len(strangers)} weights, such as {strangers[0]}, exist"
        )
        raise UnusableModel(
            f"{what} only in the adapter or only in the model; use the base that the adapter was trained on."
        )
    try:
        set_peft_model_state_dict(model, saved)
    except RuntimeError as error:  # PyTorch raises RuntimeError for weights of other shapes
        reason = str(error).splitlines()[-1].strip()
        what = f"The adapter in {folder} has weights whose shapes do not fit the model ({reason})"
        raise UnusableModel(f"{what}; use the base that the adapter was trained on.") from None


def _model_name(name: str) -> str:
    """Returns the name that the saved weight called `name` has in a model of transformers, without the prefix that PEFT
    adds when it saves."""
    return name.removeprefix("base_model.model.")


def _check_targets(model: PreTrainedModel, linears: set[str], head: nn.Module | None) -> None:
    """Raises InvalidOption if the model has an adapter on its output layer (`head`), or on a linear layer that is not
    in `linears`. Training on texts cannot change layers outside `linears`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        base = module.get_base_layer()
        if base is head:
            message = (
                f"target_modules names '{name}', the model's head, on which no adapter is trained; leave '{name}' out."
            )
            raise InvalidOption("target_modules", message)
        if isinstance(base, nn.Linear) and name not in linears:
            message = f"target_modules names '{name}', a layer that texts do not pass through; leave '{name}' out."
            raise InvalidOption("target_modules", message)


def _refusal(model: PreTrainedModel, targets: list[str], error: ValueError) -> str:
    """Returns an error message for the user that says why PEFT refused to put an adapter on the modules `targets`."""
    from peft.utils.error import NoMatchingPeftModuleError

    if isinstance(error, NoMatchingPeftModuleError):
        name = type(model).__name__
        return f"target_modules is {tuple(targets)}, but {name} has no such modules; name linear layers that it has."
    return f"target_modules is {tuple(targets)}, which cannot be used ({str(error).partition('. ')[0]}); name others."


def _linears(model: PreTrainedModel, like: PreTrainedModel) -> set[str]:
    """Returns the names of the model's linear layers whose output affects the loss of a text. A backward pass of `like`
    on a few tokens finds these layers. As a side effect the function freezes both models. Four kinds of layers are left
    out:

    - layers for images
    - layers whose result is not the matrix product of input and weight
    - layers whose weights other code reads directly, without calling the layer
    - layers whose output only makes a choice, such as some routers
    """
    learning: set[str] = set()
    names = linears_in(like)

    def note(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        sizes = (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)
        product = [*inputs[0].shape[:-1], sizes[1]] if inputs and inputs[0].shape[-1] == sizes[0] else None
        if isinstance(output, Tensor) and list(output.shape) == product and output.requires_grad:
            hook: Any = output.register_hook
            hook(lambda gradient: learning.add(names[module]) if gradient.any() else None)

    model.requires_grad_(False)
    like.requires_grad_(False)
    embeddings = cast(nn.Module, like.get_input_embeddings())
    hooks = [module.register_forward_hook(note) for module in names]
    hooks.append(embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_().clone()))
    try:
        ids = torch.arange(3, 11, device=like.device)[None] % like.config.get_text_config().vocab_size
        like(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
    kinds = {kind_of(name) for name in learning}  # a few tokens do not reach every expert
    return {name for name in linears_in(model).values() if kind_of(name) in kinds}


def linears_in(model: nn.Module) -> dict[nn.Module, str]:
    """Returns all linear layers of the model, each with its name."""
    return {module: name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def _adaptable(model: PreTrainedModel, linears: set[str]) -> list[str]:
    """Returns the names from `linears` of the layers on which an adapter can be trained. Leaves out the head (the
    output layer), routers, and layers whose weights the kernels of Mamba read directly."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if name in linears and module is not head and not is_router(name) and not is_read_only(model, name)
    ]


def _experts(model: PreTrainedModel) -> list[str]:
    """Returns the target modules with which PEFT puts an adapter on the experts of a mixture of experts, but not on its
    routers.

    The list is empty unless transformers keeps all experts of a layer in one three-dimensional weight.
    """
    return sorted(_parameters_of_experts(model).keys() - ROUTERS)


def _as_asked_for(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """Returns the target modules `targets` under the names that PEFT expects from its caller.

    transformers stacks experts: it keeps the weights of all experts of a layer in one weight. A saved adapter names the
    stacked weight, such as gate_up_proj. PEFT expects the names of the weights before they were stacked, such as w1 and
    w3.
    """
    experts = _parameters_of_experts(model)
    before = {parameter: [name for name in experts if experts[name] == parameter] for parameter in experts.values()}
    return sorted({name for target in targets for name in before.get(target, [target])})


def _parameters_of_experts(model: PreTrainedModel) -> dict[str, str]:
    """Returns the names under which PEFT puts an adapter on experts or their router, such as w1, each with the name of
    the model's parameter that it means, such as gate_up_proj. The result is empty unless PEFT knows the model's type,
    and transformers keeps the weights of all experts of a layer in one weight."""
    from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING

    if not any(parameter.ndim == 3 and "experts" in name for name, parameter in model.named_parameters()):
        return {}
    pattern = _MODEL_TO_CONVERSION_PATTERN.get(model.config.get_text_config().model_type)
    return dict(_MOE_TARGET_MODULE_MAPPING.get(pattern, {}))


def is_router(name: str) -> bool:
    return any("router" in part or part in ROUTERS for part in name.split("."))


def is_read_only(model: PreTrainedModel, name: str) -> bool:
    """Whether an adapter on the layer called `name` would have no effect. It would have none if the layer is in a Mamba
    block whose kernels read the layer's weights directly and do not call the layer."""
    parent, _, part_name = name.rpartition(".")
    block = model.get_submodule(parent)
    is_mamba = all(hasattr(block, part) for part in ("A_log", "D", "conv1d"))
    return is_mamba and part_name != "in_proj"


def _names(model: PreTrainedModel, chosen: list[str]) -> list[str]:
    """Returns the names of the modules in `chosen`, each shortened to its last part, because PEFT finds its target
    modules by such names. A name stays whole if a module that is not in `chosen` has the same last part."""
    suffixes = {name.rpartition(".")[2] for name in chosen}
    others = [name for name, _ in model.named_modules() if name not in set(chosen)]
    clear = {suffix for suffix in suffixes if not any(other.rpartition(".")[2] == suffix for other in others)}
    return sorted(clear) + [name for name in chosen if name.rpartition(".")[2] not in clear]
