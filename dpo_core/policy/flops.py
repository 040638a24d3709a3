"""Counts the floating-point operations of a training step, and measures the operations per second of a device."""

import time
from functools import cache, partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_core.models.quantization import shape_of
from dpo_core.plan.rules import keeps_logits
from dpo_core.policy.batch import Batch


class Flops:
    """Counts the floating-point operations of the matrix products in a forward and backward pass of a model (arXiv
    2204.02311, appendix B).

    A multiplication and an addition are two operations. Attention is taken to be causal. The operations that compute
    attention scores are counted for the forward pass, and again for the backward pass, which repeats them. So are the
    operations that compute logits, unless the batch has so few logits that they are kept. For frozen weights no
    gradient is counted. With `recomputed` activations, the operations of all layers' forward passes are counted again,
    too.
    """

    def __init__(self, model: PreTrainedModel, *, recomputed: bool = False) -> None:
        config, head = model.config.get_text_config(), model.get_output_embeddings()
        inner = [m for m in model.modules() if m is not head and not isinstance(m, nn.Embedding)]
        weights = [weight for module in inner for weight in module.parameters(recurse=False)]
        routed = getattr(config, "num_experts_per_tok", None) or 1
        experts = sum(_per_input(w, recomputed) * routed // len(w) for w in weights if w.ndim == 3)
        self.per_token: int = sum(_per_input(w, recomputed) for w in weights if w.ndim == 2) + experts
        self.per_row: int = 0 if head is None else _per_input(head.weight, False)
        self._logits_per_row: int = 0 if head is None else 2 * shape_of(head.weight).numel()
        self._keeps_logits = partial(
            keeps_logits,
            str(model.device.type),
            vocabulary=config.vocab_size,
            capped=bool(getattr(config, "final_logit_softcapping", None)),
        )
        heads: int = getattr(config, "num_attention_heads", 0)  # a state-space model has none
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(1, heads))
        self.per_seen_token: int = (14 + 4 * recomputed) * width * config.num_hidden_layers

    def count(self, batch: Batch) -> int:
        """Returns the number of floating-point operations in a forward and backward pass of the batch."""
        seen = sum(
            (stop - start) * (prefix_stop - prefix_start) + (stop - start) * (stop - start + 1) // 2
            for prefix_start, prefix_stop, start, stop in batch.segments
        )
        per_row = self.per_row + self._logits_per_row * (not self._keeps_logits(rows=len(batch.rows)))
        return self.per_token * len(batch.input_ids) + per_row * len(batch.rows) + self.per_seen_token * seen


def _per_input(weight: Tensor, twice: bool) -> int:
    """Returns the number of floating-point operations that a product with `weight` costs for one input row in a
    training step. The number is the sum of:

    - the operations of the product itself; these count double if `twice`, for a product that the backward pass repeats
    - the operations for the gradient of the input
    - the operations for the gradient of the weight, if the weight is trained
    """
    return (4 + 2 * weight.requires_grad + 2 * twice) * shape_of(weight).numel()


SLOW = 5e9  # FLOP/s; a CPU without instructions for bfloat16 is slower


@cache
def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Measures how many floating-point operations per second the device does in a large matrix product of this dtype,
    and returns the best of five tries. Each process measures only once for a dtype and device.

    On a CPU that is very slow in this dtype the product is smaller, because the large product would take a minute.
    """
    if device.type != "cpu":
        return _product_rate(8192, dtype, device)
    rate = _product_rate(256, dtype, device)
    return rate if rate < SLOW else _product_rate(1536, dtype, device)


def _product_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # waits until the device has computed the product
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times)
