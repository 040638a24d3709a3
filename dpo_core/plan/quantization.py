"""Decides which of a model's weights are compressed by NF4, judging by the names and shapes of the weights alone. Uses
only the standard library.

transformers keeps the experts of a mixture in weights that hold all experts of a layer, even if each expert has its own
weights in the safetensors files. NF4 compresses only linear layers, so it leaves experts as they are.
"""

from math import prod

from dpo_core.options import InvalidOption
from dpo_core.plan.adapters import ROUTERS
from dpo_core.plan.inputs import Shapes, in_layer

# Model types whose layers multiply by weights of a class of their own, or whose layers transformers does not name.
WITHOUT_LINEARS = {"gpt2", "openai-gpt", "falcon", "ctrl", "biogpt", "bert"}
IN_GROUPS = "wo_a"  # of DeepSeek V4: its products are of groups of inputs, in a class of its own


def quantized_weights(model: Shapes) -> list[str]:
    """Returns the names of the weights that NF4 compresses: those of the linear layers in the model's decoder, without
    experts, routers, and weights that the kernels of a Mamba block read directly."""
    if model.config.get("model_type") in WITHOUT_LINEARS:
        return []
    return [name for name, shape in model.weights.items() if len(shape) == 2 and in_layer(name) and _fits(model, name)]


def _fits(model: Shapes, name: str) -> bool:
    parts = name.removesuffix(".weight").split(".")
    block = ".".join(parts[:-1])
    is_mamba = all(f"{block}.{part}" in model.weights for part in ("A_log", "D", "conv1d.weight"))
    is_read_only = is_mamba and parts[-1] != "in_proj"
    routes = any("router" in part or part in ROUTERS for part in parts)
    return name.endswith(".weight") and not routes and not is_read_only and not {"experts", IN_GROUPS} & set(parts)


def is_quantizable(model: Shapes) -> bool:
    """Whether NF4 compresses at least half of the weights in the model's layers."""
    quantized = count_quantized(model)
    return 2 * quantized >= model.numbers - model.outside and quantized > 0


def count_quantized(model: Shapes) -> int:
    """Returns the number of parameters in the weights that NF4 compresses."""
    return sum(prod(model.weights[name]) for name in quantized_weights(model))


def check_quantization(model: Shapes) -> None:
    """Raises InvalidOption if NF4 would leave most weights of the model's layers as they are."""
    if not is_quantizable(model):
        quantized, inside = count_quantized(model), model.numbers - model.outside
        what = "The option 'quantization' is 'nf4', which leaves stacked experts as they are"
        share = f"it would compress only {quantized} of the {inside} weights in the layers of this model"
        raise InvalidOption("quantization", f"{what}: {share}; leave 'quantization' out.")
