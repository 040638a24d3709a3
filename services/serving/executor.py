"""How a model runs on CPUs: in the process of its engine."""

import torch._dynamo.config
from vllm.v1.executor.uniproc_executor import UniProcExecutor


class ExecutorOnCpus(UniProcExecutor):  # type: ignore[misc]
    """vLLM's scheduler and worker in one process, which compiles nothing.

    By default they are two processes, and each takes 10 s and 700 MB to start. Compiling the sampler would keep the
    first request waiting for 15 s.
    """

    def _init_executor(self) -> None:
        torch._dynamo.config.disable = True  # its variable is read when torch is loaded, and a fork has loaded it
        super()._init_executor()
