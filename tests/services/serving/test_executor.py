"""Tests how vLLM runs a model on CPUs."""

import pytest
import torch
import torch._dynamo.config
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from services.serving.executor import ExecutorOnCpus

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # in vLLM's own imports


def test_nothing_is_compiled_from_the_moment_the_executor_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = list[object]()

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        compiled.append(graph)
        return graph.forward

    def run(self: UniProcExecutor) -> None:
        torch._dynamo.reset()
        assert torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1)) == 2

    monkeypatch.setattr(torch._dynamo.config, "disable", False)
    monkeypatch.setattr(UniProcExecutor, "_init_executor", run)
    run(UniProcExecutor.__new__(UniProcExecutor))
    assert len(compiled) == 1
    ExecutorOnCpus.__new__(ExecutorOnCpus)._init_executor()
    assert len(compiled) == 1
