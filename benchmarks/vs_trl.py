"""Compares training with raydpo and with TRL on the same rows in the same order, with the same AdamW.

    python benchmarks/vs_trl.py --pairs 64 --batch-size 8 --repeats 3 --json results.json

It needs torch, transformers, datasets and trl. If Ray is installed, raydpo also runs in a Ray Train worker. Columns
run in turn, forward and then backward, each in its own process; figures are medians. `reference` is the time of
scoring if that is a separate phase, and `train` that of the steps; neither includes the set-up. Memory is the
process's peak: VmHWM, or what CUDA allocated. With `--kind ranked` a row has four completions, and TRL gets its six
pairs.
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
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.columns import BEST, OURS, Figures, columns
from benchmarks.rows import dialogues, save_model

CARRIED = ("data", "model", "dtype", "batch-size", "adapter-rank")  # options that a column's process is given
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
    data = "JSON Lines of prompt/chosen/rejected messages. Default: random rows."
    parser.add_argument("--data", type=Path, help=data)
    parser.add_argument("--model", type=Path, help="A Hugging Face folder. Default: a random Llama of 40M weights.")
    parser.add_argument("--kind", choices=NUM_COMPLETIONS, default="pairs", help="Default: %(default)s.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="Default: %(default)s.")
    parser.add_argument("--pairs", type=int, default=64, help="Rows to train on. Default: %(default)s.")
    parser.add_argument("--batch-size", type=int, default=8, help="Rows in an optimizer step. Default: %(default)s.")
    parser.add_argument("--adapter-rank", type=int, default=0, help="Of a LoRA. Default: 0, which trains all weights.")
    parser.add_argument("--repeats", type=int, default=3, help="Default: %(default)s.")
    parser.add_argument("--ablate", action="store_true", help="Also run raydpo without each of its parts.")
    parser.add_argument("--json", type=Path, help="A file for every figure. Default: none is written.")
    parser.add_argument("--column", help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.data and args.kind == "ranked":
        parser.error("--data holds pairs, and --kind ranked needs random rows; leave one of them out.")
    return args


def _prepare(args: argparse.Namespace, folder: Path) -> None:
    """Writes the rows and the model of all runs to `folder`."""
    rows = _read_pairs(args.data) if args.data else dialogues(args.pairs, num_completions=NUM_COMPLETIONS[args.kind])
    if len(rows) < args.pairs:
        raise SystemExit(f"{args.data} has {len(rows)} rows; --pairs asks for {args.pairs}.")
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
    """Returns each column's distance from our final weights, as a share of the distance that training moved ours."""
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
