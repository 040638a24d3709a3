"""Compares training an adapter with training all weights: seconds per step, peak memory and size of a checkpoint.

    python benchmarks/training/adapter.py --pairs 64 --batch-size 8 --repeats 3

The model is a Llama with 40M random weights, and the rows are random dialogues. Each training runs in its own process;
the figures are medians. Peak memory is the process's VmHWM minus the process's memory before the model was loaded.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.memory import forget_peak, peak
from benchmarks.rows import dialogues, encode, save_model

MAX_TOKENS_PER_PACK = 4096
KINDS = ("all weights", "adapter")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=64, help="Number of training rows. Default: %(default)s.")
    parser.add_argument("--batch-size", type=int, default=8, help="Rows per optimizer step. Default: %(default)s.")
    repeats = "Number of trainings with an adapter, and of trainings of all weights. Default: %(default)s."
    parser.add_argument("--repeats", type=int, default=3, help=repeats)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        print("RESULT " + json.dumps(run(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder, "model"), dialogues(args.pairs, num_completions=2))
        runs = [{kind: _in_its_own_process(args, kind, Path(folder)) for kind in KINDS} for _ in range(args.repeats)]
    print("|  | " + " | ".join(KINDS) + " | adapter / all weights |\n|---|---|---|---|")
    for name in runs[0][KINDS[0]]:
        whole, adapter = (statistics.median(run[kind][name] for run in runs) for kind in KINDS)
        print(f"| {name} | {whole:.4g} | {adapter:.4g} | {adapter / whole:.3f} |")


def run(args: argparse.Namespace) -> dict[str, float]:
    """Trains one epoch in this process. Returns the seconds per step, the peak memory and the sizes of a checkpoint."""
    from dpo_core import (
        Lora,
        Optim,
        TrainConfig,
        load_policy,
        load_tokenizer,
        score_reference,
        train,
    )

    model = args.folder / "model"
    tokenizer = load_tokenizer(model)
    rows = dialogues(args.pairs, num_completions=2)
    groups = encode(rows, tokenizer)
    forget_peak()
    before = peak()
    policy = load_policy(model, adapter=Lora() if args.kind == "adapter" else None)
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
    return {"a step, s": (ended - started) / len(batches), "peak memory, MB": (peak() - before) / 1e6, **sizes}


def _in_its_own_process(args: argparse.Namespace, kind: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, f"--kind={kind}", f"--folder={folder}"]
    command += [f"--pairs={args.pairs}", f"--batch-size={args.batch_size}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    figures: dict[str, float] = json.loads(line.removeprefix("RESULT "))
    print(kind, figures, flush=True)
    return figures


if __name__ == "__main__":
    main()
