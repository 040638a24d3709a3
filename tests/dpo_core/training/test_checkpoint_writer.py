"""Tests how much memory the copy of a model that is split over ranks takes on the rank that writes it."""

import json
import os
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_core.policy.scorer import Scorer
from dpo_core.training.checkpoint_writer import _model_state
from dpo_core.training.weights import Weights, dtypes_of, shard
from tests.dpo_core.conftest import build_policy


class Live(TorchDispatchMode):
    """Adds up the bytes of the tensors that operations have made and that still exist."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves(args) if type(tensor) is torch.Tensor}
        for tensor in tree_leaves(result):
            if type(tensor) is torch.Tensor and (storage := tensor.untyped_storage())._cdata not in self.known | given:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._end, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _end(self, storage, size):
        self.known.discard(storage)
        self.now -= size


def gather(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    policy = build_policy(num_hidden_layers=12).bfloat16()
    expected = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
    scorer, dtypes = Scorer(policy), dtypes_of(policy)
    shard(scorer, "full")
    weights = Weights(policy, dtypes)
    with Live() as live:
        state = _model_state(policy, weights)
    assert state.keys() == (expected.keys() if rank == 0 else set())
    assert all(torch.equal(state[name], expected[name]) for name in state)
    Path(folder, f"{rank}.json").write_text(json.dumps([live.most, sum(map(torch.numel, expected.values()))]))
    sys.stdout.flush()
    os._exit(0)  # the threads of gloo do not end by themselves


@pytest.mark.slow
def test_a_model_in_half_precision_is_never_gathered_in_float32(tmp_path):
    start_processes(gather, (str(tmp_path),), nprocs=2, start_method="fork")
    (first, numbers), (second, _) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    largest = 4 * 320 * 32  # bytes of the head in float32
    assert 2 * numbers <= first <= 2 * numbers + 3 * largest < 4 * numbers
    assert second <= 3 * largest
