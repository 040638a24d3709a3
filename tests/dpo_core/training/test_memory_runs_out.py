"""Tests that a step whose memory runs out is taken again in smaller packs, with the same result on every rank.

Each rank is a process. The kernel refuses memory to rank 0, which has a limit for its address space.
"""

import json
import os
import resource
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from dpo_core.config import Optim, TrainConfig
from dpo_core.encoding.encode import EncodedGroup
from dpo_core.options import Dpo, Mpo
from dpo_core.training import trainer
from tests.dpo_core.conftest import build_policy, build_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[3]
# Large blocks come from the kernel and go back at once, so that the limit counts what is in use.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
OBJECTIVES = {"by pack": Dpo(), "whole batch": Mpo()}
TIMES = ("tokens_per_second", "hfu")


def groups_of(number: int, length: int) -> list[EncodedGroup]:
    ids = [5 + i % 300 for i in range(length)]
    prompt, completions = ids, (ids[: length // 2], ids[9 : 9 + length // 3])
    return [EncodedGroup(prompt, completions, (-9.0 - line, -8.0), line + 1) for line in range(number)]


LARGE = {"many": groups_of(12, 120), "one": groups_of(1, 600)}


def take_steps(objective: str, large: str, room: int | None) -> tuple[list[dict[str, Any]], nn.Module, int]:
    """Takes a small step, then two large ones that may take `room` bytes, and writes no checkpoint. The optimizer
    subtracts the gradients, so that the weights tell them.

    Returns the metrics and warnings of the steps, the policy, and the bytes that a large step took.
    """
    policy = build_policy(hidden_size=128, intermediate_size=1024, max_position_embeddings=1024)
    trainer.make_optimizer = lambda weights, _: torch.optim.SGD(weights, lr=1.0)  # type: ignore[assignment]
    config = TrainConfig(
        objective=OBJECTIVES[objective],
        optim=Optim(learning_rate=0.1),
        batch_size=12,
        n_epochs=1,
        max_length=1024,
        max_tokens_per_pack=8192,
        activation_checkpointing="off",
        checkpoint_steps=100,
    ).resolved(12)
    batches, results, before = [groups_of(2, 30), LARGE[large], LARGE[large], []], [], 0
    steps = trainer.train(config, policy, build_tokenizer(), batches, total_steps=4, checkpoint_dir="none")
    for result in islice(steps, 3):
        results.append({"warning": result.warning, **result.metrics})
        if result.step == 1:
            before = status("VmSize")
            if room is not None:
                resource.setrlimit(resource.RLIMIT_AS, (before + room, before + room))
    return results, policy, status("VmPeak") - before


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main(folder: Path, rank: int, ranks: int, objective: str, large: str, share: float) -> None:
    """Takes the steps twice, the second time with a limit on rank 0: `share` of the memory that the first large step
    took."""
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=ranks)
    room = None
    for name in ("plain", "limited"):
        results, policy, needed = take_steps(objective, large, room)
        (folder / f"{name}-{rank}.json").write_text(json.dumps(results))
        save_file({key: weight.detach() for key, weight in policy.named_parameters()}, folder / f"{name}-{rank}.st")
        room = int(share * needed) if rank == 0 else None
    os._exit(0)  # the threads of gloo do not end by themselves


def run(folder: Path, *, ranks: int, objective: str, large: str, share: float) -> list[str]:
    """Returns what each rank wrote to stderr; an empty text for a rank that ended well."""
    rest = [str(ranks), objective, large, str(share)]
    commands = [[sys.executable, "-m", __spec__.name, str(folder), str(rank), *rest] for rank in range(ranks)]
    started = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | RETURNED, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    told = [process.communicate()[1] for process in started]
    return [text if process.returncode else "" for process, text in zip(started, told, strict=True)]


@pytest.mark.parametrize(
    ("ranks", "objective", "large", "now"),
    [
        (1, "by pack", "many", "a forward pass has at most "),
        (1, "whole batch", "many", "a forward pass has at most "),
        (1, "by pack", "one", "activations are computed again in the backward pass"),
        (2, "by pack", "many", "a forward pass has at most "),
        (2, "whole batch", "many", "a forward pass has at most "),
    ],
)
def test_a_step_whose_memory_runs_out_is_taken_with_less(ranks, objective, large, now, tmp_path):
    share = 0.8 if large == "one" else 0.6
    assert run(tmp_path, ranks=ranks, objective=objective, large=large, share=share) == [""] * ranks
    for rank in range(ranks):
        plain, limited = (json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for name in ("plain", "limited"))
        first, told, later = (step.pop("warning") for step in limited)
        assert told.startswith(f"Memory ran out in step 2; from here on {now}")
        assert (first, later) == (None, None)  # it is told once, because what the run learned holds for later steps
        for before, after in zip(plain, limited, strict=True):
            before.pop("warning")
            for name in TIMES:
                del before[name], after[name]
            assert after == pytest.approx(before, rel=1e-5, abs=1e-6)
        expected, found = (load_file(tmp_path / f"{name}-{rank}.st") for name in ("plain", "limited"))
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)


def test_a_step_that_never_fits_ends_the_run_with_the_remedy(tmp_path):
    (told,) = run(tmp_path, ranks=1, objective="by pack", large="one", share=0.1)
    expected = (
        "Memory ran out in step 2 with one row in a forward pass and activations computed again; lower max_length"
    )
    assert expected in told


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:4]), *sys.argv[4:6], float(sys.argv[6]))
