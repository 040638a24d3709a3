from itertools import accumulate

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dpo_core.plan import rules
from dpo_core.policy import logps as module
from dpo_core.policy.logps import token_logps
from tests.dpo_core.policy.test_flops import FORMULAS
from tests.dpo_core.training.test_pack_size import changes


def example(
    dtype: torch.dtype, bias: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, dtype=dtype, generator=g, requires_grad=True)
    weight = torch.randn(11, 5, dtype=dtype, generator=g, requires_grad=True)
    shift = torch.randn(11, dtype=dtype, generator=g, requires_grad=True) if bias else None
    return hidden, weight, shift, torch.randint(11, (7,), generator=g)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tile_rows", [1, 3, 7, 100])
@pytest.mark.parametrize("tile_columns", [1, 4, 100])
def test_gradients_pass_gradcheck(tile_rows, tile_columns, bias):
    hidden, weight, shift, targets = example(torch.float64, bias)
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_logps(h, w, b, targets, tile_rows=tile_rows, tile_columns=tile_columns)[0],
        (hidden, weight, shift),
    )


def test_a_soft_cap_bends_logits_and_gradients_alike():
    hidden, weight, bias, targets = example(torch.float64)
    logps, _ = token_logps(hidden, weight, bias, targets, soft_cap=2.0, tile_rows=3, tile_columns=4)
    capped = 2 * torch.tanh(torch.nn.functional.linear(hidden, weight, bias) / 2)
    torch.testing.assert_close(logps, capped.log_softmax(1).gather(1, targets[:, None])[:, 0])
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_logps(h, w, b, targets, soft_cap=2.0, tile_rows=3, tile_columns=4)[0],
        (hidden, weight, bias),
    )


@pytest.mark.parametrize("tile_rows", [1, 3, 100])
@pytest.mark.parametrize("tile_columns", [1, 4, 100])
def test_tile_size_changes_nothing(tile_rows, tile_columns):
    hidden, weight, bias, targets = example(torch.float32)
    logps, correct = token_logps(hidden, weight, bias, targets, tile_rows=tile_rows, tile_columns=tile_columns)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    expected = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    assert correct.tolist() == (logits.argmax(1) == targets).tolist()
    upstream = torch.linspace(-1, 1, 7)
    ours = torch.autograd.grad(logps @ upstream, (hidden, weight, bias))
    theirs = torch.autograd.grad(expected @ upstream, (hidden, weight, bias))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_logits_far_from_zero_neither_overflow_nor_vanish():
    hidden, weight, _, targets = example(torch.float32)
    logps, _ = token_logps(hidden * 1000, weight, None, targets)
    expected = (hidden * 1000 @ weight.T).log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logps, expected)


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, _, targets = example(torch.float32, bias=False)
    logps, _ = token_logps(hidden, weight.detach(), None, targets)
    logps.sum().backward()
    assert hidden.grad is not None


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation makes, including temporary tensors and gradients."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return made


@pytest.fixture
def nothing_is_kept(monkeypatch):
    monkeypatch.setattr(rules, "KEPT_LOGITS", {})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tile", [(1, 4), (3, 100), (100, 100)])
def test_kept_logits_change_no_gradient(tile, bias, monkeypatch):
    inputs = example(torch.float64, bias)
    leaves, targets = [leaf for leaf in inputs[:3] if leaf is not None], inputs[3]

    def gradients():
        logps, _ = token_logps(*inputs[:3], targets, tile_rows=tile[0], tile_columns=tile[1])
        upstream = torch.linspace(-1, 1, 7, dtype=torch.float64)
        return [torch.autograd.grad(logps, leaves, upstream, retain_graph=True) for _ in range(2)]

    kept, again = gradients()  # the second backward pass finds no tiles and computes them
    monkeypatch.setattr(rules, "KEPT_LOGITS", {})
    computed, _ = gradients()
    torch.testing.assert_close((kept, again), (computed, computed), rtol=0, atol=0)


def test_kept_logits_spare_one_of_four_products(monkeypatch):
    hidden, weight, _, targets = example(torch.float32, bias=False)

    def products(tile_rows):
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            token_logps(hidden, weight, None, targets, tile_rows=tile_rows)[0].sum().backward()
        return counter.get_total_flops() / (2 * hidden.shape[0] * weight.numel())

    assert [products(rows) for rows in (3, 100)] == [3, 3]
    monkeypatch.setattr(rules, "KEPT_LOGITS", {"cpu": hidden.shape[0] * weight.shape[0] - 1})  # one too few
    assert [products(rows) for rows in (3, 100)] == [4, 4]


def test_no_logits_are_kept_if_no_gradient_is_wanted():
    rows, vocabulary = 512, 8192
    hidden, weight = torch.randn(rows, 1), torch.randn(vocabulary, 1, requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.int64)

    def peak() -> int:
        return max(accumulate(changes(lambda: token_logps(hidden, weight, None, targets, tile_rows=16))))

    assert peak() > 4 * rows * vocabulary
    with torch.no_grad():
        assert peak() < 4 * rows * vocabulary / 8


def test_rows_times_vocabulary_is_never_held(nothing_is_kept):
    rows, vocabulary = 512, 8192
    hidden = torch.randn(rows, 1, requires_grad=True)
    weight = torch.randn(vocabulary, 1, requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.int64)
    with Largest() as largest:
        logps, _ = token_logps(hidden, weight, None, targets, tile_rows=16, tile_columns=1024)
        logps.sum().backward()
    assert largest.numel == 16 * 1024


@pytest.mark.parametrize("tile_rows", [64, 1024])
@pytest.mark.parametrize("tile_columns", [48, 1024])
def test_gradients_in_bfloat16_lose_no_bits_by_the_number_of_tiles(tile_rows, tile_columns):
    """The expected gradients are those in float32 on the same numbers. A single product of a tile is off by 2e-3."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(16384, 32, generator=g).bfloat16()
    weight = (0.1 * torch.randn(192, 32, generator=g)).bfloat16()
    bias, targets = torch.randn(192, generator=g).bfloat16(), torch.randint(192, (16384,), generator=g)
    upstream = 1e-3 + 1e-3 * torch.randn(16384, generator=g)

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight, bias)]
        for leaf in inputs:
            leaf.grad_dtype = torch.float32
        token_logps(*inputs, targets, tile_rows=tile_rows, tile_columns=tile_columns)[0].backward(upstream)
        return [leaf.grad for leaf in inputs]

    for ours, exact in zip(gradients(torch.bfloat16), gradients(torch.float32), strict=True):
        assert ours.dtype == torch.float32
        assert ((ours - exact).norm() / exact.norm()).item() < 3e-3


def test_a_leaf_in_bfloat16_gets_its_gradient_in_bfloat16():
    hidden, weight, bias, targets = example(torch.bfloat16)
    token_logps(hidden, weight, bias, targets, tile_rows=3)[0].sum().backward()
    assert {leaf.grad.dtype for leaf in (hidden, weight, bias)} == {torch.bfloat16}


def assert_nothing_is_rounded_to_bfloat16(device: str) -> None:
    """Asserts that log-probabilities equal those in float32 on the same numbers, and gradients to 2e-3.

    Gradients may differ, because the factor that they are products of is rounded.
    """
    g = torch.Generator().manual_seed(0)
    numbers = [torch.randn(*shape, generator=g).bfloat16().to(device) for shape in ((64, 128), (512, 128), (512,))]
    targets = torch.randint(512, (64,), generator=g).to(device)

    def found(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in numbers]
        for leaf in leaves:
            leaf.grad_dtype = torch.float32
        logps, _ = token_logps(*leaves, targets, tile_rows=16, tile_columns=100)
        logps.sum().backward()
        return [logps.detach(), *(leaf.grad for leaf in leaves)]

    (logps, *gradients), (exact, *exact_gradients) = found(torch.bfloat16), found(torch.float32)
    torch.testing.assert_close(logps, exact, rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(gradients, exact_gradients, strict=True):
        assert ((ours - theirs).norm() / theirs.norm()).item() < 2e-3


def test_logits_stay_in_float32_if_products_can(monkeypatch):
    """CUDA has a product of bfloat16 numbers in float32. Here it is simulated, because no other device has it."""
    monkeypatch.setattr(module, "_keeps_float32", lambda factor: factor.dtype == torch.bfloat16)
    monkeypatch.setattr(torch, "mm", lambda left, right, out_dtype: left.to(out_dtype) @ right.to(out_dtype))
    assert_nothing_is_rounded_to_bfloat16("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_logits_of_a_gpu_stay_in_float32():
    assert_nothing_is_rounded_to_bfloat16("cuda")
