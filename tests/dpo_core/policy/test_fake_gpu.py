"""Runs the code for GPUs with tensors that have a device, a shape and a dtype, but no numbers.

Code that would wait for the device, mix it with the host, or call a kernel wrongly fails here, too. The device is
`meta`: torch's builds without CUDA cannot slice or differentiate tensors on `cuda`, not even without numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedModel, Qwen3Config

from dpo_core.config import Lora
from dpo_core.models.adapter import attach
from dpo_core.policy import attention, logps
from dpo_core.policy.batch import collate
from dpo_core.policy.forward import packed_logps, readings
from dpo_core.policy.logps import token_logps
from dpo_core.policy.measures import NUM_MEASURES, Measures
from dpo_core.policy.routing import Experts, by_completion
from tests.dpo_core.conftest import SIZES, build_groups

DEVICE = torch.device("meta")
WINDOWS = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
CONFIGS = {
    "Llama": LlamaConfig(**SIZES),
    "Qwen3": Qwen3Config(**SIZES),
    "with windows": Gemma3TextConfig(**SIZES, **WINDOWS),
}
ADAPTERS = {"whole": None, "lora": Lora(r=4), "dora": Lora(r=4, use_dora=True), "dropout": Lora(r=4, dropout=0.1)}
FLASH = torch.ops.torch_attn._varlen_attn.default
FLASH_BACKWARD = torch.ops.torch_attn._varlen_attn_backward.default
WIDE_PRODUCT = torch.ops.aten.mm.dtype


class Calls(TorchDispatchMode):
    """Records the operations that run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def gpu(monkeypatch):
    """Makes the code treat the device as a GPU that suits flash attention and wide products, without pinned memory."""
    monkeypatch.setattr(attention, "_suits_flash", lambda query, value: query.dtype == torch.bfloat16)
    monkeypatch.setattr(logps, "_keeps_float32", lambda factor: factor.dtype == torch.bfloat16)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    attention._lay_out.cache_clear()
    attention._masks.cache_clear()
    yield
    attention._lay_out.cache_clear()
    attention._masks.cache_clear()


@contextmanager
def on_the_device(model: PreTrainedModel, dtype: torch.dtype = torch.bfloat16) -> Iterator[Calls]:
    """Moves the model to the device in the block, in which tensors have no numbers, and yields the operations that
    run."""
    with FakeTensorMode(allow_non_fake_inputs=True), Calls() as calls:
        for module in model.modules():
            for own in (module._parameters, module._buffers):
                for name, tensor in own.items():
                    if tensor is not None:
                        empty = torch.empty(tensor.shape, dtype=dtype, device=DEVICE)
                        own[name] = nn.Parameter(empty, tensor.requires_grad) if own is module._parameters else empty
        yield calls


def packed(model, batch):
    return packed_logps(model, batch, readings(model.config)[0], shared=True)


@pytest.fixture
def batch():
    return collate(build_groups(4, 3)).to(DEVICE)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_pack_goes_through_the_kernels_of_a_gpu_and_back_and_waits_for_nothing(family, adapter, batch, gpu):
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    if ADAPTERS[adapter]:
        attach(model, ADAPTERS[adapter], task_type="CAUSAL_LM")
    with on_the_device(model) as calls:
        found, correct, _ = packed(model, batch)
        found.sum().backward()
    assert {FLASH, FLASH_BACKWARD, WIDE_PRODUCT} <= calls.seen
    assert {found.device, correct.device} == {DEVICE}
    assert (found.dtype, correct.dtype) == (torch.float32, torch.bool)
    assert found.shape == correct.shape == batch.rows.shape
    for name, weight in model.named_parameters():
        assert (weight.grad is not None) == weight.requires_grad, name
        if weight.requires_grad:
            assert (weight.grad.shape, weight.grad.device, weight.grad.dtype) == (weight.shape, DEVICE, torch.bfloat16)


def test_float32_goes_segment_by_segment_and_stays_on_the_device(batch, gpu):
    model = AutoModelForCausalLM.from_config(CONFIGS["with windows"]).eval()
    with on_the_device(model, torch.float32) as calls:
        found = packed(model, batch).logps
        found.sum().backward()
    assert not {FLASH, WIDE_PRODUCT} & calls.seen
    assert (found.device, found.dtype) == (DEVICE, torch.float32)


def test_the_loss_that_balances_experts_waits_for_nothing():
    groups, experts = build_groups(4, 3), Experts(number=8, chosen=2, coefficient=0.1)
    batch = collate(groups, with_ends=True).to(DEVICE)
    with FakeTensorMode(allow_non_fake_inputs=True):
        shape = len(batch.input_ids), experts.number
        logits = [torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, requires_grad=True) for _ in range(2)]
        table = pad(by_completion(batch, experts.spread(logits)), (NUM_MEASURES, 0))
        loss = experts.loss(Measures(groups, table))
        loss.backward()
    assert (table.shape, loss.device, loss.dtype) == ((12, NUM_MEASURES + 16), DEVICE, torch.float32)
    assert all(layer.grad.dtype == torch.bfloat16 for layer in logits)


@pytest.mark.parametrize("soft_cap", [None, 30.0])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_gradients_of_tiles_stay_on_the_device_in_float32(soft_cap, has_bias, gpu):
    with FakeTensorMode(), Calls() as calls:
        leaves = [torch.empty(*shape, dtype=torch.bfloat16, device=DEVICE) for shape in ((9, 64), (300, 64), (300,))]
        for leaf in leaves:
            leaf.requires_grad_().grad_dtype = torch.float32
        hidden, weight, bias = leaves
        targets = torch.empty(9, dtype=torch.long, device=DEVICE)
        found, _ = token_logps(
            hidden, weight, bias if has_bias else None, targets, soft_cap=soft_cap, tile_rows=4, tile_columns=100
        )
        found.sum().backward()
    assert WIDE_PRODUCT in calls.seen
    for leaf in leaves[: 2 + has_bias]:
        assert (leaf.grad.shape, leaf.grad.device, leaf.grad.dtype) == (leaf.shape, DEVICE, torch.float32)


def test_what_waits_for_the_device_or_mixes_it_with_the_host_is_seen():
    with FakeTensorMode():
        ours, theirs = torch.empty(3, device=DEVICE), torch.empty(3)
        with pytest.raises(DataDependentOutputException):
            ours.sum().item()
        with pytest.raises(RuntimeError, match="device"):
            ours + theirs
