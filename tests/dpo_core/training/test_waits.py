"""Counts how often a training step waits for the device, which a GPU pays for by standing still."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_core import options
from dpo_core.config import Lora, TrainConfig
from dpo_core.models.adapter import attach
from dpo_core.training.trainer import train

ATEN = torch.ops.aten
# Operations whose result, or the shape of it, the host must know before it goes on.
WAITS = {ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.masked_select.default, ATEN._unique2.default}
OBJECTIVES = {"dpo": options.Dpo(), "simpo": options.Simpo(), "ipo": options.Ipo(), "aot": options.Aot()}


class Waits(TorchDispatchMode):
    """Counts the operations in WAITS by name, and selections by a mask."""

    def __init__(self):
        super().__init__()
        self.counted = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indices = args[1] if func in (ATEN.index.Tensor, ATEN.index_put_.default) else ()
        masks = [index for index in indices if index is not None and index.dtype == torch.bool]
        if func in WAITS or masks:
            self.counted[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch):
    waits = Waits()

    def counted(name):
        method = getattr(torch.Tensor, name)

        def count(tensor, *given):
            waits.counted[name] += 1
            return method(tensor, *given)

        return count

    for name in ("tolist", "numpy", "cpu"):  # which do not pass a dispatch mode
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    return waits


@pytest.mark.parametrize("adapter", [None, Lora(r=4, dropout=0.1)], ids=["all weights", "adapter"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_waits_once_for_its_metrics(objective, adapter, policy, tokenizer, pairs, waits, tmp_path):
    if adapter:
        attach(policy, adapter, task_type="CAUSAL_LM")
    config = TrainConfig(
        objective=OBJECTIVES[objective],
        batch_size=8,
        n_epochs=1,
        max_length=64,
        max_tokens_per_pack=64,
        activation_checkpointing="off",
        checkpoint_steps=100,
    ).resolved(8)
    steps = train(config, policy, tokenizer, [pairs] * 3, total_steps=3, checkpoint_dir=tmp_path)
    next(steps)
    waits.counted.clear()
    with waits:
        next(steps)
    assert waits.counted == {"tolist": 1}
    steps.close()
