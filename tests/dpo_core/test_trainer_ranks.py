"""`train` on two gloo ranks: each is a process that runs this file."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from dpo_core.config import Optim, TrainConfig
from dpo_core.encode import EncodedGroup
from dpo_core.model import load_policy, load_tokenizer
from dpo_core.options import Dpo, Mpo
from dpo_core.trainer import train

CONFIG = TrainConfig(
    objective=Dpo(beta=0.5),
    optim=Optim(learning_rate=1e-2),
    batch_size=8,
    n_epochs=1,
    max_length=64,
    max_tokens_per_pack=64,
    checkpoint_steps=2,
)
OBJECTIVES = {"dpo": Dpo(beta=0.5), "mpo": Mpo()}  # the losses of the second join completions of both ranks


def read_pairs(folder: Path) -> list[EncodedGroup]:
    return [EncodedGroup(**fields) for fields in json.loads((folder / "pairs.json").read_text())]


def train_in(folder: Path) -> None:
    """Train what stands beside `folder`; leave metrics, weights and checkpoints in it."""
    model, pairs = folder.parent / "model", read_pairs(folder.parent)
    policy = load_policy(model)
    if folder.name == "rank1":
        torch.nn.init.zeros_(policy.lm_head.weight)  # ranks start from rank 0's weights
    batches = [pairs, pairs[:1], pairs[1:4]]  # the second leaves a rank without a pack
    config = replace(CONFIG, objective=OBJECTIVES[folder.parent.name])
    steps = train(config, policy, load_tokenizer(model), batches, total_steps=3, checkpoint_dir=folder)
    results = [(r.step, r.num_tokens, str(r.checkpoint and r.checkpoint.name), r.metrics) for r in steps]
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    save_file({name: p.detach() for name, p in policy.named_parameters()}, folder / "weights.safetensors")


def disagree_in(folder: Path) -> None:
    """Give each rank other groups: both must notice, and neither hang."""
    model, pairs = folder.parent / "model", read_pairs(folder.parent)
    own = pairs[: 3 + dist.get_rank()]
    with pytest.raises(RuntimeError, match="different global batches for step 1"):
        list(train(CONFIG, load_policy(model), load_tokenizer(model), [own], total_steps=1, checkpoint_dir=folder))


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    train_in(folder / f"rank{rank}")
    disagree_in(folder / f"disagreement{rank}")
    dist.destroy_process_group()


@contextmanager
def two_ranks(folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Both processes; those still alive at the end are killed."""
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)]) for rank in range(2)]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_ranks_train_as_one_does(objective, policy, tokenizer, pairs, tmp_path):
    tmp_path /= objective
    tmp_path.mkdir()
    policy.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.json").write_text(json.dumps([asdict(pair) for pair in pairs]))
    with two_ranks(tmp_path) as ranks:
        train_in(tmp_path / "alone")
        assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]

    alone, *both = (tmp_path / name for name in ("alone", "rank0", "rank1"))
    expected = json.loads((alone / "results.json").read_text())
    for folder in both:
        found = json.loads((folder / "results.json").read_text())
        for (*counts, name, metrics), (*their_counts, their_name, theirs) in zip(found, expected, strict=True):
            assert counts == their_counts
            assert name == (their_name if folder.name == "rank0" else "None")
            theirs["tokens_per_second"] = metrics["tokens_per_second"]
            assert metrics == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    weights = [load_file(folder / "weights.safetensors") for folder in (alone, *both)]
    torch.testing.assert_close(weights[1], weights[2], rtol=0, atol=0)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)
    assert not list(both[1].glob("step-*"))


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
