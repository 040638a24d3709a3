"""How a model runs on CPUs: in the process of its engine."""

import torch._dynamo.config
from vllm.v1.executor.uniproc_executor import UniProcExecutor


class ExecutorOnCpus(UniProcExecutor):  # type: ignore[misc]
    """vLLM's scheduler and worker in one process, which compiles nothing.

    They are two by default, each worth 10 s and 700 MB; and the first request would wait 15 s for its sampler.
    """

    def _init_executor(self) -> None:
        torch._dynamo.config.disable = True  # its variable is read when torch is loaded, and a fork has loaded it
        super()._init_executor()
