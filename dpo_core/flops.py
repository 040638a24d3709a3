"""The floor of a step's time: its floating-point operations, and how many of them the device does in a second."""

import time
from functools import cache

import torch
from torch import nn
from transformers import PreTrainedModel

from dpo_core.batch import Batch


def count_flops(policy: PreTrainedModel, batch: Batch) -> int:
    """Of the matrix products in one forward and backward of the pack: a multiplication and an addition count two.

    As in Megatron's count (arXiv 2205.05198, appendix A) attention is taken as causal. The head's tiles are
    computed twice, and so are attention's scores; frozen weights have no gradient to compute.
    """
    config = policy.config.get_text_config()
    num_tokens, head = len(batch.input_ids), policy.get_output_embeddings()
    flops = num_tokens * sum(_flops_per_token(p) for m in policy.modules() if m is not head for p in _matrices(m))
    routed = getattr(config, "num_experts_per_tok", 0) / (getattr(config, "num_local_experts", 0) or 1)
    flops += round(routed * num_tokens * sum(_flops_per_token(p) for p in policy.parameters() if p.ndim == 3))
    if head is not None:
        flops += len(batch.rows) * (_flops_per_token(head.weight) + 2 * head.weight.numel())
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    seen = sum(
        (stop - start) * (prefix_stop - prefix_start) + (stop - start) * (stop - start + 1) // 2
        for prefix_start, prefix_stop, start, stop in batch.segments
    )
    return flops + config.num_hidden_layers * 14 * config.num_attention_heads * head_width * seen


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    return [module.weight] if isinstance(module, nn.Linear) else []


def _flops_per_token(weight: nn.Parameter) -> int:
    return (6 if weight.requires_grad else 4) * weight.numel()


@cache
def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large matrix product, the best of five; measured once."""
    size = 1536 if device.type == "cpu" else 8192
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times)
