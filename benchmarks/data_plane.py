"""A job's data, from the uploaded file to the batches of a trainer: rates, and memory that must not grow with rows.

    python benchmarks/data_plane.py --rows 10000 100000 1000000 --json results.json

Made-up pairs of about 1 KB go through what a job does with them, each count of rows in a process of its own:
`survey` as at upload; `encode`, which is `preparation.prepare` of an objective without a reference: the file's
digest, pieces, Ray's tasks, Parquet; `cache`, a second job on the same bytes; `streamed`, one that reads its first
batch while the rest is encoded; `epoch`, one streamed to a trainer that does nothing, and once more from its middle.
With `--in-process` pieces are encoded in a pool of processes without Ray, and there is no cache and no stream. The
tokenizer's own batch call on a sample, on the same cores, before and after, is the rate to compare with. Making the
rows, starting Ray, scoring and training are in no figure. It needs Linux.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.feedback import save_tokenizer, write_pairs
from benchmarks.stages import Figures, stages
from benchmarks.tokenizer import tokens_per_second

TOKENIZER_ROWS = 20_000  # that the tokenizer is trained on, and at most measured on
THREADS, PROCESSES = "tokenizer, its threads", "tokenizer, processes"
WHOLE = ("survey", "encode", "cache", "epoch")


def main() -> None:
    args = _arguments()
    if args.folder:
        folder = args.folder
        print("RESULT " + json.dumps(stages(folder / "pairs.jsonl", args.model, folder, in_process=args.in_process)))
        return
    results = {}
    with tempfile.TemporaryDirectory(prefix="raydpo-bench-") as temporary:
        model = Path(temporary) / "model"
        save_tokenizer(model, num_rows=TOKENIZER_ROWS)
        for num_rows in args.rows:
            results[num_rows] = _measure(args, num_rows, model)
            _print_table(num_rows, results[num_rows])
    if args.json:
        args.json.write_text(json.dumps({"in_process": args.in_process, "rows": results}, indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--in-process", action="store_true", help="a pool of processes instead of Ray")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(args: argparse.Namespace, num_rows: int, model: Path) -> dict[str, Figures]:
    """The stages by name, and the tokenizer in two ways."""
    with tempfile.TemporaryDirectory(prefix="raydpo-bench-") as folder:
        file = Path(folder) / "pairs.jsonl"
        write_pairs(file, num_rows)
        size = file.stat().st_size
        before = _tokenizer(model, file, num_rows)
        found = _in_its_own_process(args, Path(folder), model)
        after = _tokenizer(model, file, num_rows)  # machines have slow minutes: the better rate counts
        for name in (THREADS, PROCESSES):
            found[name] = {"tokens_per_second": max(before[name], after[name])}
    found["survey"]["bytes_on_disk"] = size
    return found


def _tokenizer(model: Path, file: Path, num_rows: int) -> Figures:
    sample = min(num_rows, TOKENIZER_ROWS)
    ways = ((THREADS, 1, True), (PROCESSES, os.cpu_count() or 1, False))
    return {
        name: tokens_per_second(model, file, sample, processes=processes, threads=threads)
        for name, processes, threads in ways
    }


def _in_its_own_process(args: argparse.Namespace, folder: Path, model: Path) -> dict[str, Figures]:
    in_process = ["--in-process"] if args.in_process else []
    command = [sys.executable, __file__, "--folder", str(folder), "--model", str(model), *in_process]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{folder} failed:\n{run.stderr}")
    found: dict[str, Figures] = json.loads(run.stdout.rpartition("RESULT ")[2])
    return found


def _print_table(num_rows: int, found: dict[str, Figures]) -> None:
    tokens, size = found["encode"]["tokens"], found["survey"]["bytes_on_disk"]
    print(f"\n{num_rows:,} rows, {size / 1e9:.3f} GB, {tokens / num_rows:.0f} tokens to a row, {os.cpu_count()} cores")
    head = ("seconds", "rows/s", "tokens/s", "driver MB", "task MB", "disk MB")
    print(f"{'':24}" + "".join(f"{title:>13}" for title in head))
    units = {"seconds": (1, 2), "rows_per_second": (1, 0), "tokens_per_second": (1, 0)}  # and decimals
    units |= {"driver_peak_bytes": (1e6, 0), "task_peak_bytes": (1e6, 0), "bytes_on_disk": (1e6, 1)}
    for name, figures in found.items():
        cells = (
            f"{figures[key] / unit:,.{decimals}f}" if figures.get(key) else "-"
            for key, (unit, decimals) in units.items()
        )
        print(f"{name:24}" + "".join(f"{cell:>13}" for cell in cells))
    whole = tokens / sum(found[name]["seconds"] for name in WHOLE if name in found)
    for name in (THREADS, PROCESSES):
        rate = found[name]["tokens_per_second"]
        print(f"Of the {name}: encoding has {found['encode']['tokens_per_second'] / rate:.2f},", end=" ")
        print(f"all of survey, encoding, cache and an epoch {whole / rate:.2f}.")
    print(f"Resumed in the middle, the first batch comes after {found['resumed epoch']['first_batch_seconds']:.2f} s.")
    if "first_batch_seconds" in found.get("streamed", {}):
        prepared = found["encode"]["seconds"] + found["epoch"]["first_batch_seconds"]
        streamed = found["streamed"]["first_batch_seconds"]
        print(f"Streamed, the first batch comes after {streamed:.1f} s; prepared whole, after {prepared:.1f} s.")
    if "cache" in found:
        print(f"The cache takes {found['cache']['seconds'] / found['encode']['seconds']:.3f} of encoding's time.")


if __name__ == "__main__":
    main()
