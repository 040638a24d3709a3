"""Defines how vLLM runs a model on CPUs: the scheduler and the model run in one process, nothing is compiled, and LoRA
adapters change only the requests that name them."""

from typing import Any

import torch
import torch._dynamo.config
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.executor.uniproc_executor import UniProcExecutor


class LoraOnCpus(PunicaWrapperCPU):  # type: ignore[misc]
    """Computes what LoRA adapters add to the layers of their base model, for the tokens of one step.

    A token of a request to the base model has the index -1 in place of an adapter's. vLLM's own class takes -1 for the
    last of the loaded adapters (vllm#48421, not merged in vLLM 0.29): a request to the base model would be answered
    with that adapter if a request to any adapter is computed in the same step. vLLM's kernels for GPUs skip -1.
    """

    def add_lora_linear(self, y: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Adds to `y` (tokens, outputs), the outputs of a linear layer, what each token's adapter adds to them.

        The outputs of tokens without an adapter stay the same bits, even if an adapter's weights are not finite.
        """
        without = self.token_lora_indices < 0
        if without.all():
            return
        outputs = y[without]
        super().add_lora_linear(y, *args, **kwargs)
        y[without] = outputs


class ExecutorOnCpus(UniProcExecutor):  # type: ignore[misc]
    """Runs vLLM's scheduler and worker in one process, compiles nothing, and computes adapters with LoraOnCpus.

    By default, scheduler and worker are two processes, and each takes 10 s and 700 MB to start. Compiling the sampler
    would delay the first request by 15 s.
    """

    def _init_executor(self) -> None:
        # The environment variable would have no effect, because a fork has imported torch already.
        torch._dynamo.config.disable = True
        CpuPlatform.get_punica_wrapper = classmethod(lambda cls: f"{__name__}.{LoraOnCpus.__name__}")
        super()._init_executor()
