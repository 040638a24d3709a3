"""Quantizes the frozen base of an adapter (the model under it) to NF4, arXiv 2305.14314. Each weight takes 4.1 bits,
and products are computed in the dtype that the model had before."""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_core.models.adapter import BEFORE_NF4, fingerprint, is_read_only, is_router
from dpo_core.models.architecture import decoder_layers
from dpo_core.options import InvalidOption


def quantize(model: PreTrainedModel, device: str | torch.device) -> PreTrainedModel:
    """Moves the model to the device, and converts the linear layers of its decoder to NF4. Only one layer at a time is
    on the device in full precision.

    Embeddings, the head, norms and routers keep their dtype. Raises InvalidOption if most weights of the decoder's
    layers would stay unquantized.
    """
    names = _linears(model)
    _check_share(model, names)
    model.requires_grad_(False)
    setattr(model, BEFORE_NF4, fingerprint(model))
    for name in names:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, _in_nf4(model.get_submodule(name), model.dtype, device))
    model.is_loaded_in_4bit = True  # PEFT recognizes a quantized model by this
    return model.to(device)


@torch.no_grad()
def round_to_nf4(model: PreTrainedModel) -> None:
    """Rounds those weights that `quantize` would convert: each becomes the nearest value that NF4 can represent, but
    keeps its dtype. An adapter that was trained on NF4 can then be merged into exactly the values on which it was
    trained."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for name in _linears(model):
        weight = model.get_submodule(name).weight
        packed, state = quantize_4bit(weight.data, quant_type="nf4", compress_statistics=True)
        weight.copy_(dequantize_4bit(packed, state))


def is_quantized(model: nn.Module) -> bool:
    return bool(getattr(model, "is_loaded_in_4bit", False))


def precision_of(model: PreTrainedModel) -> str:
    """Returns the dtype in which the model computes, such as "bfloat16". If the model's base is in NF4, the result is a
    text such as "bfloat16 over nf4"."""
    return str(model.dtype).removeprefix("torch.") + (" over nf4" if is_quantized(model) else "")


def scales_of(model: nn.Module) -> Iterator[Tensor]:
    """Yields three tensors for each weight in NF4, which are needed to turn its bytes into numbers:

    - the absolute maximum of each block of 64 numbers, quantized to 8 bits
    - the offset that is added to these maxima
    - the scales that turn the 8 bits of the maxima into numbers
    """
    for weight in model.parameters():
        if state := getattr(weight, "quant_state", None):
            yield from (state.absmax, state.offset, state.state2.absmax)


def shape_of(weight: Tensor) -> torch.Size:
    """Returns the shape of the weight as a matrix. A weight in NF4 is stored with another shape, because two of its
    numbers share a byte."""
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
        what = "The option 'quantization' is 'nf4', which only compresses linear layers"
        share = f"these have only {quantized} of the {inside} weights of this {type(model).__name__}"
        raise InvalidOption("quantization", f"{what}, and {share}; leave 'quantization' out.")


def _in_nf4(linear: nn.Linear, dtype: torch.dtype, device: str | torch.device) -> nn.Linear:
    from bitsandbytes.nn import Linear4bit, Params4bit

    with torch.device("meta"):
        made = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4")
    made.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=made)
    made.bias = linear.bias
    made.support_avx512bf16_for_cpu = False  # in eval mode this CPU kernel has no gradient
    return cast(nn.Linear, made.train(linear.training).to(device))
