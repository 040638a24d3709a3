"""The floor of a step's time: its floating-point operations, and how many of them the device does in a second."""

import time
from functools import cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_core.models.quantization import shape_of
from dpo_core.policy.batch import Batch


class Flops:
    """Of the matrix products in a forward and backward; a multiplication and an addition are two (arXiv 2204.02311, B).

    Attention is causal. The head's tiles and attention's scores are computed twice. Frozen weights have no gradient.
    With `recomputed` activations the layers run forward once more.
    """

    def __init__(self, model: PreTrainedModel, *, recomputed: bool = False) -> None:
        config, head = model.config.get_text_config(), model.get_output_embeddings()
        inner = [m for m in model.modules() if m is not head and not isinstance(m, nn.Embedding)]
        weights = [weight for module in inner for weight in module.parameters(recurse=False)]
        routed = getattr(config, "num_experts_per_tok", None) or 1
        experts = sum(_of_matrix(w, recomputed) * routed // len(w) for w in weights if w.ndim == 3)
        self.per_token: int = sum(_of_matrix(w, recomputed) for w in weights if w.ndim == 2) + experts
        self.per_row: int = 0 if head is None else _of_matrix(head.weight, True)
        heads: int = getattr(config, "num_attention_heads", 0)  # a state-space model has none
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(1, heads))
        self.per_seen_token: int = (14 + 4 * recomputed) * width * config.num_hidden_layers

    def of(self, batch: Batch) -> int:
        seen = sum(
            (stop - start) * (prefix_stop - prefix_start) + (stop - start) * (stop - start + 1) // 2
            for prefix_start, prefix_stop, start, stop in batch.segments
        )
        rows = 0 if len(batch.ends) else len(batch.rows)
        return self.per_token * len(batch.input_ids) + self.per_row * rows + self.per_seen_token * seen


def _of_matrix(weight: Tensor, twice: bool) -> int:
    """Of a row of its input: forward, the input's gradient, and its own."""
    return (4 + 2 * weight.requires_grad + 2 * twice) * shape_of(weight).numel()


SLOW = 5e9  # FLOP/s, of bfloat16 on a CPU without instructions for it


@cache
def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large matrix product, the best of five; measured once.

    Of a smaller one where the processor computes this dtype so slowly that the large one would take a minute.
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
        product[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times)
