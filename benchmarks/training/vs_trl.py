"""Compares training with raydpo and with TRL on the same rows in the same order, with the same AdamW.

    python benchmarks/training/vs_trl.py --pairs 64 --batch-size 8 --repeats 3 --json results.json

The benchmark needs torch, transformers, datasets and trl. If Ray is installed, raydpo also trains in a Ray Train
worker. Each column of the table is one way of training, measured in its own process. A repetition measures all columns
one after the other, every second repetition in reverse order; the figures are medians. `reference_seconds` is the time
of scoring with the reference model, if scoring is a separate phase, and `train_seconds` the time of the training steps;
neither includes loading. Memory is the process's peak: VmHWM, or the memory that CUDA allocated. With `--kind ranked` a
row has four completions, and TRL trains on the row's six pairs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.rows import dialogues, save_model
from benchmarks.training.columns import BEST, OURS, Figures, columns

CARRIED = ("data", "model", "dtype", "batch-size", "adapter-rank")  # options that are passed to the process of a column
NUM_COMPLETIONS = {"pairs": 2, "ranked": 4}


def main() -> None:
    args = _arguments()
    if args.column:
        print("RESULT " + json.dumps(columns(args)[args.column](args)))
        return
    names = list(columns(args))
    runs: dict[str, list[Figures]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        _prepare(args, Path(folder))
        for repeat in range(args.repeats):
            for name in names if repeat % 2 == 0 else names[::-1]:
                runs[name].append(_in_its_own_process(args, name, Path(folder)))
                print(f"{name}: {runs[name][-1]}", flush=True)
        medians = {name: _median(figures) for name, figures in runs.items()}
        ways = {} if args.adapter_rank else _weight_differences(args.model, Path(folder), names)
        for name, difference in ways.items():
            medians[name]["weights_difference"] = difference
    _print_table(medians)
    if args.json:
        arguments = {"kind": args.kind, "dtype": args.dtype, "rows": args.pairs, "batch_size": args.batch_size}
        args.json.write_text(json.dumps({"arguments": arguments, "medians": medians, "runs": runs}, indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = "JSON Lines file of pairs with prompt, chosen and rejected messages. Default: random rows."
    model = "Hugging Face folder of the model to train. Default: a Llama with 40M random weights."
    kind = "Kind of rows: pairs, or ranked rows of four completions each. Default: %(default)s."
    dtype = "Data type of training. Default: %(default)s."
    rank = "Rank of the LoRA adapter to train. Default: 0, which trains all weights."
    repeats = "Number of measurements of each column. Default: %(default)s."
    ablate = "Also measure raydpo with one part left out, for each of the parts of dpo_core that make training fast."
    parser.add_argument("--data", type=Path, help=data)
    parser.add_argument("--model", type=Path, help=model)
    parser.add_argument("--kind", choices=NUM_COMPLETIONS, default="pairs", help=kind)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help=dtype)
    parser.add_argument("--pairs", type=int, default=64, help="Number of training rows. Default: %(default)s.")
    parser.add_argument("--batch-size", type=int, default=8, help="Rows per optimizer step. Default: %(default)s.")
    parser.add_argument("--adapter-rank", type=int, default=0, help=rank)
    parser.add_argument("--repeats", type=int, default=3, help=repeats)
    parser.add_argument("--ablate", action="store_true", help=ablate)
    parser.add_argument("--json", type=Path, help="JSON file for all figures. Default: no file is written.")
    parser.add_argument("--column", help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.data and args.kind == "ranked":
        parser.error("--data holds pairs, and --kind ranked needs random rows; leave out --data or --kind ranked.")
    return args


def _prepare(args: argparse.Namespace, folder: Path) -> None:
    """Writes the rows and the model that all ways of training use to `folder`, and sets `args.data` and
    `args.model`."""
    rows = _read_pairs(args.data) if args.data else dialogues(args.pairs, num_completions=NUM_COMPLETIONS[args.kind])
    if len(rows) < args.pairs:
        raise SystemExit(f"{args.data} has {len(rows)} rows; --pairs is {args.pairs}. Lower --pairs.")
    args.data = folder / "rows.jsonl"
    args.data.write_text("".join(json.dumps(row) + "\n" for row in rows[: args.pairs]))
    if args.model is None:
        args.model = folder / "model"
        save_model(args.model, rows)


def _read_pairs(path: Path) -> list[dict[str, Any]]:
    pairs = [json.loads(line) for line in path.open()]
    return [{"prompt": pair["prompt"], "completions": [pair["chosen"], pair["rejected"]]} for pair in pairs]


def _in_its_own_process(args: argparse.Namespace, column: str, folder: Path) -> Figures:
    options = [f"--{name}={getattr(args, name.replace('-', '_'))}" for name in CARRIED]
    ablate = ["--ablate"] if args.ablate else []
    weights = [] if args.adapter_rank else ["--weights", str(folder / f"{column}.pt")]
    command = [sys.executable, __file__, *options, *ablate, "--column", column, *weights]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{column} failed:\n{run.stderr}")
    figures: Figures = json.loads(run.stdout.rpartition("RESULT ")[2])
    return figures


def _median(runs: list[Figures]) -> Figures:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def _weight_differences(model: Path, folder: Path, names: list[str]) -> Figures:
    """Returns how far the trained weights of each way of training in `names` (columns of the table) are from those of
    raydpo.

    The distance is relative to how far raydpo's training moved the weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    start = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    before = torch.cat([p.detach().flatten() for p in start.parameters()])
    ours = torch.load(folder / f"{OURS}.pt")
    way = (ours - before).norm()
    return {name: ((torch.load(folder / f"{name}.pt") - ours).norm() / way).item() for name in names}


def _print_table(medians: dict[str, Figures]) -> None:
    ours = medians[OURS]
    head = ("rows/s", "with ref.", "tokens/s", "peak GB", "ours, with ref.", "memory", "matmul", "weights")
    print(f"\n{'':26}" + "".join(f"{title:>17}" for title in head))
    for name, figures in medians.items():
        share = f"{figures['matmul_share']:.0%}" if "matmul_share" in figures else "-"
        cells = (
            f"{figures['rows_per_second']:.2f}",
            f"{figures['rows_per_second_with_reference']:.2f}",
            f"{ours['tokens'] / figures['train_seconds']:.0f}",
            f"{figures['peak_bytes'] / 1e9:.2f}",
            f"{ours['rows_per_second_with_reference'] / figures['rows_per_second_with_reference']:.2f} x",
            f"{ours['peak_bytes'] / figures['peak_bytes']:.2f}",
            share,
            f"{figures['weights_difference']:.1e}" if "weights_difference" in figures else "-",
        )
        print(f"{name:26}" + "".join(f"{cell:>17}" for cell in cells))
    print(f"Training alone, against {BEST}: {ours['rows_per_second'] / medians[BEST]['rows_per_second']:.2f} x")


if __name__ == "__main__":
    main()
