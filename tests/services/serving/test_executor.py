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


def step(lora: LoraOnCpus, adapters: list[int], *, is_prefill: bool) -> None:
    """Begins a step whose tokens belong to these adapters (0: to the base model). Adapter 2 is in the last slot."""
    mapping = SimpleNamespace(index_mapping=tuple(adapters), prompt_mapping=tuple(adapters), is_prefill=is_prefill)
    lora.update_metadata(mapping, [1, 2], 2, 32)


@pytest.mark.parametrize("is_prefill", [True, False], ids=["prompts", "answers"])
@pytest.mark.parametrize("others", [[], [1], [2, 1]], ids=["alone", "beside the first", "beside both"])
@pytest.mark.parametrize("number", [1.0, float("nan")], ids=["finite", "not finite"])
def test_tokens_of_the_base_model_keep_their_bits_beside_those_of_adapters(
    others: list[int], is_prefill: bool, number: float
) -> None:
    """vLLM's own class takes adapter 2, whose weights are multiplied with `number`, for the base model's tokens."""
    lora = LoraOnCpus(max_num_batched_tokens=16, max_batches=16, device="cpu")
    adapters = [0, *others, 0]
    step(lora, [0, 0], is_prefill=True)
    step(lora, adapters, is_prefill=is_prefill)
    torch.manual_seed(0)
    a, b = torch.randn(2, 1, 4, 8), torch.randn(2, 1, 6, 4)
    a[1], b[1] = a[1] * number, b[1] * number
    x, y = torch.randn(len(adapters), 8), torch.randn(len(adapters), 6)
    before = y.clone()
    lora.add_lora_linear(y, x, (a,), (b,), 1.0, (6,))
    for it, token, row, found in zip(adapters, x, before, y, strict=True):
        if it:
            expected = row + b[it - 1, 0] @ (a[it - 1, 0] @ token)
            assert torch.allclose(found, expected, atol=1e-5, equal_nan=True)
        else:
            assert torch.equal(found, row)
