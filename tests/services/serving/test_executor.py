"""Tests how vLLM runs a model on CPUs."""

from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.config
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from services.serving.executor import ExecutorOnCpus, LoraOnCpus

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


@pytest.mark.parametrize("others", [[], [1], [2, 1]], ids=["alone", "beside the first", "beside both"])
def test_tokens_of_the_base_model_are_left_alone_beside_those_of_adapters(others: list[int]) -> None:
    """Adapter 2 is in the last slot, which vLLM's own class takes for the base model's tokens."""
    lora = LoraOnCpus(max_num_batched_tokens=16, max_batches=16, device="cpu")
    adapters = [0, *others, 0]
    mapping = SimpleNamespace(index_mapping=tuple(adapters), prompt_mapping=tuple(adapters), is_prefill=True)
    lora.update_metadata(mapping, [1, 2], 2, 32)
    torch.manual_seed(0)
    a, b = torch.randn(2, 1, 4, 8), torch.randn(2, 1, 6, 4)
    x, y = torch.randn(len(adapters), 8), torch.randn(len(adapters), 6)
    expected = [
        row + (b[it - 1, 0] @ (a[it - 1, 0] @ token) if it else 0)
        for it, token, row in zip(adapters, x, y, strict=True)
    ]
    lora.add_lora_linear(y, x, (a,), (b,), 1.0, (6,))
    assert torch.allclose(y, torch.stack(expected), atol=1e-5)
