"""Tests what ranks exchange, on two gloo ranks. Each rank is a fork of a process that has imported this file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from dpo_core.training import ranks

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.bfloat16, torch.int64, torch.float32, torch.float16, torch.int32, torch.bfloat16]


def raised(work) -> str:
    """Returns the error that `work` raises, in words."""
    try:
        return f"returned {work()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def fail_on_rank_1() -> str:
    if ranks.rank() == 1:
        raise OSError("no room")
    return "done"


def exchange() -> dict[str, object]:
    """Returns what this rank gets from each exchange, as JSON."""
    own = ranks.rank()
    tensors = [torch.tensor([[own, 1.0], [2.0, 10.0 * own]]), torch.tensor(7 + own), torch.tensor([0.5, own])]
    ranks.all_reduce_sum(*tensors)
    return {
        "rank": own,
        "ranks": ranks.num_ranks(),
        "sums": [tensor.tolist() for tensor in tensors],
        "least": ranks.all_reduce_min(5 - own, CPU),
        "any": ranks.on_any_rank([False, own == 0, own == 1, True], CPU),
        "together": ranks.together(lambda: own * 2, CPU),
        "failed": raised(lambda: ranks.together(fail_on_rank_1, CPU)),
        "after": ranks.all_reduce_min(own, CPU),  # no rank waits for the message of another exchange
    }


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    (folder / f"{rank}.json").write_text(json.dumps(exchange()))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory) -> list[dict[str, object]]:
    folder = tmp_path_factory.mktemp("ranks")
    subprocess.run([sys.executable, "-m", "tests.dpo_core.training.test_ranks", folder], cwd=ROOT, check=True)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_two_ranks_get_the_same_sums_minima_and_flags(exchanged):
    for rank, found in enumerate(exchanged):
        assert (found["rank"], found["ranks"]) == (rank, 2)
        assert found["sums"] == [[[1, 2], [4, 10]], 15, [1, 1]]
        assert found["least"] == 4
        assert found["any"] == [False, True, True, True]


@pytest.mark.slow
def test_a_failure_on_one_rank_is_an_error_on_all_and_no_rank_waits(exchanged):
    assert [found["together"] for found in exchanged] == [0, 2]
    assert exchanged[0]["failed"] == (
        "RuntimeError: Another rank failed while all ranks worked together; see the error in that rank's log."
    )
    assert exchanged[1]["failed"] == "OSError: no room"
    assert [found["after"] for found in exchanged] == [0, 0]


def test_a_run_of_one_process_is_the_only_rank(monkeypatch):
    tensor = torch.tensor([1.0, 2.0])
    ranks.all_reduce_sum(tensor)
    assert tensor.tolist() == [1, 2]
    assert (ranks.rank(), ranks.num_ranks(), ranks.num_local_ranks()) == (0, 1, 1)
    assert ranks.all_reduce_min(3, CPU) == 3
    assert ranks.on_any_rank([True, False], CPU) == [True, False]
    with pytest.raises(ZeroDivisionError):
        ranks.together(lambda: 1 // 0, CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert ranks.num_local_ranks() == 4


def test_messages_of_several_dtypes_go_out_in_the_order_of_the_tensors(monkeypatch):
    sent = []
    monkeypatch.setattr(ranks, "num_ranks", lambda: 2)
    monkeypatch.setattr(ranks.dist, "all_reduce", lambda tensor: sent.append(tensor.dtype))
    ranks.all_reduce_sum(*(torch.ones(2, dtype=dtype) for dtype in DTYPES))
    assert sent == DTYPES[:-1]


if __name__ == "__main__":
    start_processes(run_rank, (Path(sys.argv[1]),), nprocs=2, start_method="fork")
