"""Defines how vLLM runs a model on CPUs: the scheduler and the model run in one process, and nothing is compiled."""

import torch._dynamo.config
from vllm.v1.executor.uniproc_executor import UniProcExecutor


class ExecutorOnCpus(UniProcExecutor):  # type: ignore[misc]
    """Runs vLLM's scheduler and worker in one process, and compiles nothing.

    By default, scheduler and worker are two processes, and each takes 10 s and 700 MB to start. Compiling the sampler
    would delay the first request by 15 s.
    """

    def _init_executor(self) -> None:
        # The environment variable would have no effect, because a fork has imported torch already.
        torch._dynamo.config.disable = True
        super()._init_executor()
