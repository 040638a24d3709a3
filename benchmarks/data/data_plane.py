"""Measures speed and memory of a job's data on the path from the uploaded file to the trainer's batches.

    python benchmarks/data/data_plane.py --rows 10000 100000 1000000 --json results.json

Random preference pairs of about 1 KB go through these stages of a job, each number of rows in its own process. Memory
must not grow with the number of rows.

    survey      checking the file, as at an upload
    encode      `preparation.prepare` for an objective without a reference model: hashes the file, and starts Ray tasks
                that encode pieces of the file and write them as Parquet
    cache       preparing a second job with the same file
    streamed    reading the first batch of a job while the remaining rows are still being encoded
    epoch       reading the batches of an epoch, from the start and from the middle, without training on them

With `--in-process`, a pool of processes encodes the rows without Ray, and the stages `cache` and `streamed` are left
out. For comparison, the tokenizer's own batch call encodes a sample of the rows on the same cores, before and after the
stages. No figure includes making the rows, starting Ray, scoring or training. The benchmark needs Linux.
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
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.data.feedback import save_tokenizer, write_pairs
from benchmarks.data.stages import Figures, stages
from benchmarks.data.tokenizer import tokens_per_second

TOKENIZER_ROWS = 20_000  # rows that train the tokenizer, and the largest number of rows that measure the tokenizer
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
    counts = [10_000, 100_000, 1_000_000]
    parser.add_argument(
        "--rows", type=int, nargs="+", default=counts, help="Row counts to measure. Default: %(default)s."
    )
    in_process = "Encode the rows in a pool of processes instead of in Ray tasks."
    parser.add_argument("--in-process", action="store_true", help=in_process)
    parser.add_argument("--json", type=Path, help="JSON file for all figures. Default: no file is written.")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(args: argparse.Namespace, num_rows: int, model: Path) -> dict[str, Figures]:
    """Runs all stages on `num_rows` rows. Returns the figures of each stage by its name, and the speed of the tokenizer
    alone with threads and with processes."""
    with tempfile.TemporaryDirectory(prefix="raydpo-bench-") as folder:
        file = Path(folder) / "pairs.jsonl"
        write_pairs(file, num_rows)
        size = file.stat().st_size
        before = _tokenizer(model, file, num_rows)
        by_stage = _in_its_own_process(args, Path(folder), model)
        after = _tokenizer(model, file, num_rows)  # the better rate counts, because machines have slow minutes
        for name in (THREADS, PROCESSES):
            by_stage[name] = {"tokens_per_second": max(before[name], after[name])}
    by_stage["survey"]["bytes_on_disk"] = size
    return by_stage


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
    by_stage: dict[str, Figures] = json.loads(run.stdout.rpartition("RESULT ")[2])
    return by_stage


def _print_table(num_rows: int, by_stage: dict[str, Figures]) -> None:
    encode, size = by_stage["encode"], by_stage["survey"]["bytes_on_disk"]
    tokens = encode["tokens"]
    print(f"\n{num_rows:,} rows, {size / 1e9:.3f} GB, {tokens / num_rows:.0f} tokens per row, {os.cpu_count()} cores")
    head = ("seconds", "rows/s", "tokens/s", "driver MB", "task MB", "disk MB")
    print(f"{'':24}" + "".join(f"{title:>13}" for title in head))
    units = {"seconds": (1, 2), "rows_per_second": (1, 0), "tokens_per_second": (1, 0)}  # divisor and decimals
    units |= {"driver_peak_bytes": (1e6, 0), "task_peak_bytes": (1e6, 0), "bytes_on_disk": (1e6, 1)}
    for name, figures in by_stage.items():
        cells = (
            f"{figures[key] / unit:,.{decimals}f}" if figures.get(key) else "-"
            for key, (unit, decimals) in units.items()
        )
        print(f"{name:24}" + "".join(f"{cell:>13}" for cell in cells))
    overall = tokens / sum(by_stage[name]["seconds"] for name in WHOLE if name in by_stage)
    for name in (THREADS, PROCESSES):
        rate = by_stage[name]["tokens_per_second"]
        print(f"Share of the rate of the {name}: encoding {encode['tokens_per_second'] / rate:.2f},", end=" ")
        print(f"survey, encoding, cache and an epoch together {overall / rate:.2f}.")
    resumed = by_stage["resumed epoch"]["first_batch_seconds"]
    print(f"Resumed in the middle, the first batch comes after {resumed:.2f} s.")
    if "first_batch_seconds" in by_stage.get("streamed", {}):
        prepared = by_stage["encode"]["seconds"] + by_stage["epoch"]["first_batch_seconds"]
        streamed = by_stage["streamed"]["first_batch_seconds"]
        print(f"Streamed, the first batch comes after {streamed:.1f} s; fully prepared, after {prepared:.1f} s.")
    if "cache" in by_stage:
        print(f"The cache takes {by_stage['cache']['seconds'] / by_stage['encode']['seconds']:.3f} of encoding's time.")


if __name__ == "__main__":
    main()
