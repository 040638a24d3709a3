"""Measures the memory of ranks (training processes) that split a model's weights, while they load and while they train,
and compares it with each rank's share of the weights.

    python benchmarks/training/sharded_memory.py --ranks 1 2 4

The model is a Llama with 50M random weights, in bfloat16 on disk and trained in float32. The table has a row for each
number of ranks. A figure is the largest of any rank, minus the rank's memory after it had trained a small model in the
same way. The column *loading* is the peak while the weights are read, *training* the peak with two small steps after
that, without a checkpoint. *with file* is the kernel's VmHWM while loading; it also counts the pages of the mapped
safetensors file. These pages are in the machine's page cache, which all ranks share, and are freed as soon as the
weights are read. `--whole` also measures ranks that load the whole model and then split it.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from math import prod
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.memory import OwnMemory, forget_peak, peak
from benchmarks.rows import dialogues

PAIRS, PROMPT, COMPLETION = 1, 16, 8  # of a step on one rank, and their tokens
LAYERS, SMALL_LAYERS = 16, 2
MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="Numbers of ranks. Default: 1 2 4.")
    parser.add_argument("--whole", action="store_true", help="Also measure ranks that load the whole model first.")
    parser.add_argument("--hidden-size", type=int, default=512, help="Width of the model. Default: %(default)s.")
    parser.add_argument("--json", type=Path, help="JSON file for the figures, in bytes. Default: none.")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        _measure_ranks(*args.measure)
        return
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        _save(home / "model", args.hidden_size, LAYERS)
        _save(home / "small", 64, SMALL_LAYERS)
        rows = [measure(home, ranks, how) for how in ("parts", "whole")[: 1 + args.whole] for ranks in args.ranks]
    if args.json:
        args.json.write_text(json.dumps(rows))
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for row in rows:
        print("| " + " | ".join(f"{v / MB:.1f}" if isinstance(v, float) else str(v) for v in row.values()) + " |")


def measure(home: Path, ranks: int, how: str) -> dict[str, Any]:
    """Measures the peak memory of `ranks` processes that split a model's weights. Returns a row of the table: the peaks
    in bytes, and sizes to compare them with, such as a process's share of the weights.

    `how` says what each process reads: its own part of the weights ("parts") or all weights ("whole").
    """
    layer, outside, number = _sizes(home / "model")
    loading, with_file, training, _ = _in_its_own_process(home, ranks, how)
    share = 4.0 * number / ranks
    return {
        "ranks": ranks,
        "read": how,
        "loading": float(loading),
        "with file": float(with_file),
        "share of weights": share,
        "above the share": loading - share,
        "training": float(training),
        "share of weights, gradients, moments": 4 * share,
        "above that share": training - 4 * share,
        "a layer": 4.0 * layer,
        "outside of layers": 4.0 * outside,
        "all weights": 4.0 * number,
    }


def _sizes(folder: Path) -> tuple[int, int, int]:
    """Returns the number of weights of the model in `folder`: in one layer, outside the layers, and in the whole
    model."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        sizes = {name: prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    inside = sum(size for name, size in sizes.items() if ".layers." in name)
    return inside // LAYERS, sum(sizes.values()) - inside, sum(sizes.values())


def _in_its_own_process(home: Path, ranks: int, how: str) -> list[int]:
    """Starts a new process that measures the memory of `ranks` processes. Returns four peaks in bytes, each the largest
    of any rank (training process). `how` says what each rank reads: its part of the weights ("parts") or all ("whole").

    The first two peaks are from loading the weights: without and with the pages of mapped files. The other two are from
    training: without and with these pages.
    """
    # With these settings large blocks are returned to the system at once, so that what is free does not count.
    settings = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}
    command = [sys.executable, "-W", "ignore", __file__, "--measure", str(home), str(ranks), how]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    each = (json.loads(path.read_text()) for path in home.glob(f"{how}-{ranks}-*.json"))
    return [max(figures) for figures in zip(*each, strict=True)]


def _measure_ranks(home: str, ranks: str, how: str) -> None:
    from importlib import import_module

    from torch.multiprocessing import start_processes

    import_module("dpo_core.training.trainer")  # else each rank imports it for itself
    start_processes(_measure_rank, (int(ranks), Path(home), how), nprocs=int(ranks), start_method="fork")


def _measure_rank(rank: int, ranks: int, home: Path, how: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{home}/meeting-{how}-{ranks}", rank=rank, world_size=ranks)
    found = list[int]()
    for work in (_load, _train):
        work(home / "small", how)  # what the first run loads and keeps is there before anything counts
        gc.collect()
        forget_peak()
        before = peak()
        with OwnMemory() as own:
            work(home / "model", how)
        found += own.largest - own.before, peak() - before
        gc.collect()
        dist.barrier()
    Path(home, f"{how}-{ranks}-{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # the threads of gloo do not end by themselves


def _load(folder: Path, how: str) -> None:
    from dpo_core import load_policy
    from dpo_core.models.parts import is_unread, read_parts
    from dpo_core.policy.scorer import Scorer
    from dpo_core.training.weights import shard

    scorer = Scorer(load_policy(folder, in_parts=how == "parts"))
    shard(scorer, "full")
    if is_unread(scorer.model):
        read_parts(scorer.model)


def _train(folder: Path, how: str) -> None:
    import torch.distributed as dist

    from dpo_core import EncodedGroup, Optim, TrainConfig, load_policy, load_tokenizer, train

    prompt, completion = list(range(5, 5 + PROMPT)), list(range(5, 5 + COMPLETION))
    group = EncodedGroup(prompt, (completion, completion[::-1]), (-9.0, -9.0), 1)
    policy, size = load_policy(folder, in_parts=how == "parts"), PAIRS * dist.get_world_size()
    config = TrainConfig(
        optim=Optim(learning_rate=1e-5),
        n_epochs=1,
        batch_size=size,
        max_length=PROMPT + COMPLETION,
        max_tokens_per_pack=PAIRS * (PROMPT + 2 * COMPLETION),
        sharding="full",
        checkpoint_steps=1000,
        activation_checkpointing="off",
    )
    with tempfile.TemporaryDirectory() as checkpoints:
        tokenizer = load_tokenizer(folder)
        steps = train(config, policy, tokenizer, [[group] * size] * 3, total_steps=3, checkpoint_dir=checkpoints)
        next(steps), next(steps)
        steps.close()


def _save(folder: Path, hidden_size: int, layers: int) -> None:
    from transformers import AutoModelForCausalLM

    from demo.base_model import make_base_model

    texts = [message["content"] for row in dialogues(50, num_completions=1) for message in row["prompt"]]
    make_base_model(folder, texts, hidden_size=hidden_size, num_layers=layers, vocabulary=2000)
    AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16").save_pretrained(folder)


if __name__ == "__main__":
    main()
