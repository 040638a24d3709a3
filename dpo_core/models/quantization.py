"""A frozen base in NF4, arXiv 2305.14314: a weight takes 4.1 bits, and products are computed in the model's dtype."""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_core.models.adapter import BEFORE_NF4, fingerprint, is_read_only, is_router
from dpo_core.models.architecture import decoder_layers
from dpo_core.options import InvalidOption


def quantize(model: PreTrainedModel, device: str | torch.device) -> PreTrainedModel:
    """Move the model to the device, with the linear layers of its decoder in NF4; each is whole there for a moment.

    Embeddings, the head, norms and routers keep their dtype. Raises InvalidOption where most weights would.
    """
    names = _linears(model)
    _check_share(model, names)
    model.requires_grad_(False)
    setattr(model, BEFORE_NF4, fingerprint(model))
    for name in names:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, _in_nf4(model.get_submodule(name), model.dtype, device))
    model.is_loaded_in_4bit = True  # by which PEFT knows it
    return model.to(device)


@torch.no_grad()
def round_to_nf4(model: PreTrainedModel) -> None:
    """Rounds the weights that `quantize` quantizes, which keep their dtype: an adapter is merged into what it was
    trained on."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for name in _linears(model):
        weight = model.get_submodule(name).weight
        packed, state = quantize_4bit(weight.data, quant_type="nf4", compress_statistics=True)
        weight.copy_(dequantize_4bit(packed, state))


def is_quantized(model: nn.Module) -> bool:
    return bool(getattr(model, "is_loaded_in_4bit", False))


def precision_of(model: PreTrainedModel) -> str:
    """What it computes in, as config.json has it, and what its base is in if that differs."""
    return str(model.dtype).removeprefix("torch.") + (" over nf4" if is_quantized(model) else "")


def scales_of(model: nn.Module) -> Iterator[Tensor]:
    """What the bytes of weights in NF4 are read with: of each block of 64 its largest number, in NF4's own 8 bits."""
    for weight in model.parameters():
        if state := getattr(weight, "quant_state", None):
            yield from (state.absmax, state.offset, state.state2.absmax)


def shape_of(weight: Tensor) -> torch.Size:
    """The shape of the matrix that the weight stands for; two numbers of one in NF4 share a byte."""
    state = getattr(weight, "quant_state", None)
    return weight.shape if state is None else torch.Size(state.shape)


def _linears(model: PreTrainedModel) -> list[str]:
    inside = {module for layer in decoder_layers(model) for module in layer.modules()}
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module in inside and not is_router(name) and not is_read_only(model, name)
    ]


def _check_share(model: PreTrainedModel, names: list[str]) -> None:
    quantized = sum(model.get_submodule(name).weight.numel() for name in names)
    inside = sum(weight.numel() for layer in decoder_layers(model) for weight in layer.parameters())
    if 2 * quantized < inside or not names:
        what = f"quantization is nf4, which is for linear layers; they hold {quantized} of the {inside} weights"
        raise InvalidOption("quantization", f"{what} in the layers of {type(model).__name__}. Leave it out.")


def _in_nf4(linear: nn.Linear, dtype: torch.dtype, device: str | torch.device) -> nn.Linear:
    from bitsandbytes.nn import Linear4bit, Params4bit

    with torch.device("meta"):
        made = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4")
    made.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=made)
    made.bias = linear.bias
    made.support_avx512bf16_for_cpu = False  # a CPU's kernel for it, taken in eval mode, has no gradient
    return cast(nn.Linear, made.train(linear.training).to(device))
