"""Compares training adapters with training all weights: seconds per step, peak memory and size of a checkpoint.

    python benchmarks/training/adapter.py --rank 8 32 --pairs 64 --batch-size 8 --repeats 3

The model is a Llama with 40M random weights, and the rows are random dialogues. Each training runs in its own process;
the figures are medians. Peak memory is the process's VmHWM minus the process's memory before the model was loaded.
*Tensors* are the most bytes that PyTorch had allocated at the same time, from loading to the end of the second step of
another training in the same process, without a checkpoint.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.memory import forget_peak, most_allocated, peak
from benchmarks.rows import dialogues, encode, save_model

MAX_TOKENS_PER_PACK = 4096
ALL = 0  # in place of a rank: all weights are trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ranks = "Ranks of adapters. Default: 8 32."
    parser.add_argument("--rank", type=int, nargs="+", default=[8, 32], help=ranks)
    parser.add_argument("--pairs", type=int, default=64, help="Number of training rows. Default: %(default)s.")
    parser.add_argument("--batch-size", type=int, default=8, help="Rows per optimizer step. Default: %(default)s.")
    repeats = "Number of trainings with each adapter, and of trainings of all weights. Default: %(default)s."
    parser.add_argument("--repeats", type=int, default=3, help=repeats)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print("RESULT " + json.dumps(run(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder, "model"), dialogues(args.pairs, num_completions=2))
        ranks = [ALL, *args.rank]
        runs = [{rank: _in_its_own_process(args, rank, Path(folder)) for rank in ranks} for _ in range(args.repeats)]
    print("| | all weights | " + " | ".join(f"rank {rank} | ratio" for rank in args.rank) + " |")
    print("|" + "---|" * (2 + 2 * len(args.rank)))
    for name in runs[0][ALL]:
        whole, *adapters = (statistics.median(run[rank][name] for run in runs) for rank in ranks)
        print(f"| {name} | {whole:.4g} | " + " | ".join(f"{own:.4g} | {own / whole:.3f}" for own in adapters) + " |")


def run(args: argparse.Namespace) -> dict[str, float]:
    """Trains one epoch in this process. Returns the seconds per step, the peaks of memory and the sizes of a
    checkpoint."""
    from torch.profiler import ProfilerActivity, profile

    from dpo_core import (
        Lora,
        Optim,
        TrainConfig,
        load_policy,
        load_tokenizer,
        score_reference,
        train,
    )

    model, adapter = args.folder / "model", Lora(r=args.measure) if args.measure != ALL else None
    tokenizer = load_tokenizer(model)
    rows = dialogues(args.pairs, num_completions=2)
    groups = encode(rows, tokenizer)
    forget_peak()
    before = peak()
    policy = load_policy(model, adapter=adapter)
    groups = score_reference(policy, groups, max_tokens_per_pack=MAX_TOKENS_PER_PACK)
    batches = [groups[i : i + args.batch_size] for i in range(0, len(groups), args.batch_size)]
    config = TrainConfig(
        optim=Optim(learning_rate=1e-5), batch_size=args.batch_size, max_tokens_per_pack=MAX_TOKENS_PER_PACK
    ).resolved(len(groups))
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        for _ in train(config, policy, tokenizer, batches, total_steps=len(batches), checkpoint_dir=folder):
            ended = time.perf_counter()
        (checkpoint, *_) = sorted(Path(folder).iterdir(), reverse=True)
        sizes = {
            "checkpoint, MB": sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()) / 1e6,
            "its model, MB": sum(file.stat().st_size for file in checkpoint.glob("model/*.safetensors")) / 1e6,
        }
    figures = {"a step, s": (ended - started) / len(batches), "peak memory, MB": (peak() - before) / 1e6}
    del policy
    gc.collect()
    with (
        tempfile.TemporaryDirectory() as folder,
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
    ):
        policy, config = load_policy(model, adapter=adapter), replace(config, checkpoint_steps=1000)  # no checkpoint
        steps = train(config, policy, tokenizer, batches, total_steps=len(batches), checkpoint_dir=folder)
        next(steps), next(steps)
        steps.close()
    return figures | {"tensors, MB": most_allocated(profiled) / 1e6} | sizes


def _in_its_own_process(args: argparse.Namespace, rank: int, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, f"--measure={rank}", f"--folder={folder}"]
    command += [f"--pairs={args.pairs}", f"--batch-size={args.batch_size}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    figures: dict[str, float] = json.loads(line.removeprefix("RESULT "))
    print(f"rank {rank}" if rank else "all weights", figures, flush=True)
    return figures


if __name__ == "__main__":
    main()
