"""Compares the speed of a reference model's scores: raydpo's Ray Serve deployment and raydpo's trainer against vLLM's
`LLM.generate`.

    python benchmarks/serving/scoring.py --rows 256 --mean-length 256 --repeats 3 --json results.json

All score the same pairs of random token ids with the same weights: Llamas with random weights, one for each of the
`--sizes`, unless `--model` names a folder. Each line of the table is measured in its own process, which loads an
engine, warms the engine up with sixteen rows, scores all rows once and stops the engine. A repetition measures all
lines one after the other, every second repetition in reverse order. The figures are medians and exclude loading. The
time of the deployment includes reading the rows from Parquet, calls through the application's handle, and writing the
sums; the other times are those of `generate` or of the forward passes alone. CPU seconds are those of all processes,
Ray's included. With `--longest`, every row is one token shorter than the model's limit, because `generate` must
generate a token. Peak memory is that of the replica's process, or of the offline process, with its engine. The
benchmark runs on CPUs.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # otherwise waiting threads spin, also in Ray's processes
os.environ.pop("OMP_NUM_THREADS", None)  # each engine chooses its own number of threads
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.serving.engines import COLUMNS, OURS, Figures
from demo.base_model import make_base_model
from dpo_core.encoding.encode import EncodedGroup
from services.training.data.dataset import Dataset, write_part

ROWS_PER_PART = 1000  # rows per Parquet file, similar to the service's encoded files
WARM_ROWS = 16


def main() -> None:
    args = _arguments()
    if args.column:
        print("RESULT " + json.dumps(COLUMNS[args.column](args)))
        return
    sizes = {str(args.model): args.model} if args.model else dict.fromkeys(args.sizes)
    results = {}
    for size, args.model in sizes.items():
        with tempfile.TemporaryDirectory(prefix="raydpo-bench-") as folder:
            args.folder = Path(folder)
            num_tokens = _prepare(args, size)
            results[size] = runs = _measure(args, num_tokens)
            medians = {name: _median(figures) for name, figures in runs.items()}
            for name in COLUMNS:
                medians[name]["largest_difference"] = _largest_difference(args.folder, name)
        print(f"\n{size}: {args.rows} rows, {num_tokens:,} tokens, {args.dtype}, {os.cpu_count()} cores")
        _print_table(medians)
    if args.json:
        arguments = {name: getattr(args, name) for name in ("rows", "mean_length", "longest", "dtype")}
        args.json.write_text(json.dumps({"arguments": arguments, "runs": results}, indent=1))


def _measure(args: argparse.Namespace, num_tokens: int) -> dict[str, list[Figures]]:
    """Returns the figures of each repetition, by the name of the engine."""
    runs: dict[str, list[Figures]] = {name: [] for name in COLUMNS}
    for repeat in range(args.repeats):
        for name in COLUMNS if repeat % 2 == 0 else reversed(COLUMNS):
            runs[name].append(_in_its_own_process(args, name, num_tokens))
            print(f"{name}: {runs[name][-1]}", flush=True)
    return runs


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = "Random Llamas to score with, as hidden size (a multiple of 64) x layers. Default: 256x4 512x8 768x12."
    dtype = "Data type of weights and computation. Default: %(default)s."
    rows = "Number of pairs; the engine scores two rows for each pair. Default: %(default)s."
    mean_length = "Mean number of tokens of a prompt with one completion. Default: %(default)s."
    longest = "Make all rows as long as the model allows, whatever --mean-length is."
    repeats = "Number of measurements of each engine at each size. Default: %(default)s."
    model = "Hugging Face folder of a model with weights. Default: random Llamas."
    parser.add_argument("--model", type=Path, help=model)
    parser.add_argument("--sizes", nargs="+", default=["256x4", "512x8", "768x12"], help=sizes)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help=dtype)
    parser.add_argument("--rows", type=int, default=256, help=rows)
    parser.add_argument("--mean-length", type=int, default=256, help=mean_length)
    parser.add_argument("--longest", action="store_true", help=longest)
    parser.add_argument("--repeats", type=int, default=3, help=repeats)
    parser.add_argument("--json", type=Path, help="JSON file for all figures. Default: no file is written.")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--column", help=argparse.SUPPRESS)
    return parser.parse_args()


def _prepare(args: argparse.Namespace, size: str) -> int:
    """Writes the rows that all engines score and, unless `args.model` is set, a model of the given size.

    Returns the number of tokens of the rows, in which a prompt counts once for each completion.
    """
    from transformers import AutoConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if args.model is None:
        args.model = args.folder / "model"
        text = ["".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ", k=10_000))]
        hidden_size, layers = map(int, size.split("x"))
        make_base_model(args.model, text, hidden_size=hidden_size, num_layers=layers, vocabulary=32_000)
    config = AutoConfig.from_pretrained(args.model).get_text_config()
    limit = config.max_position_embeddings - 1
    mean_length = limit if args.longest else args.mean_length
    for name, num_rows in (("warm", WARM_ROWS), ("rows", args.rows)):
        groups = _groups(num_rows, mean_length, limit, config.vocab_size, spread=0 if args.longest else 0.6)
        uri = str(args.folder / name)
        chunks = [groups[i : i + ROWS_PER_PART] for i in range(0, num_rows, ROWS_PER_PART)]
        parts = tuple(write_part(uri, f"{i:05d}.parquet", chunk) for i, chunk in enumerate(chunks))
        (args.folder / f"{name}.json").write_text(Dataset(uri=uri, parts=parts).model_dump_json())
    return sum(len(group.prompt_ids) + len(ids) for group in groups for ids in group.completion_ids)


def _groups(num_rows: int, mean_length: int, limit: int, vocabulary: int, *, spread: float) -> list[EncodedGroup]:
    """Returns `num_rows` groups (a prompt and two completions each) of random token ids, of a vocabulary of
    `vocabulary` ids.

    A row is a prompt with one completion; three fifths of its tokens are the prompt's. Rows have log-normal lengths,
    `mean_length` tokens on average and at most `limit`; `spread` is the standard deviation of the logarithm.
    """
    rng = random.Random(0)

    def ids(share: float) -> list[int]:
        mean = share * mean_length * rng.lognormvariate(-(spread**2) / 2, spread)
        return rng.choices(range(vocabulary), k=max(1, min(round(mean), int(share * limit))))

    return [EncodedGroup(ids(0.6), (ids(0.4), ids(0.4)), None, line) for line in range(1, num_rows + 1)]


def _in_its_own_process(args: argparse.Namespace, column: str, num_tokens: int) -> Figures:
    options = [f"--model={args.model}", f"--dtype={args.dtype}", f"--folder={args.folder}"]
    run = subprocess.run([sys.executable, __file__, *options, "--column", column], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{column} failed:\n{run.stderr}")
    figures: Figures = json.loads(run.stdout.rpartition("RESULT ")[2])
    return figures | {"tokens_per_second": num_tokens / figures["seconds"]}


def _median(runs: list[Figures]) -> Figures:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def _largest_difference(folder: Path, column: str) -> float:
    """Returns the largest difference, in nats, between the log-probabilities of completions that two engines computed:
    that of the table's column `column`, and raydpo's.

    The log-probabilities are those of each engine's last measurement.
    """
    sums, ours = (json.loads((folder / f"{name}.sums.json").read_text()) for name in (column, OURS))
    return max(abs(one - other) for one, other in zip(sums, ours, strict=True))


def _print_table(medians: dict[str, Figures]) -> None:
    ours = medians[OURS]["seconds"]
    head = ("seconds", "tokens/s", "ours is", "CPU ms/1k tokens", "loaded GB", "peak GB", "sums differ")
    print("| | " + " | ".join(head) + " |\n" + "|---" * (len(head) + 1) + "|")
    for name, figures in medians.items():
        tokens = figures["tokens_per_second"] * figures["seconds"]
        cells = (
            f"{figures['seconds']:.2f}",
            f"{figures['tokens_per_second']:,.0f}",
            f"{figures['seconds'] / ours:.2f} x",
            f"{1e6 * figures['cpu_seconds'] / tokens:,.0f}",
            f"{figures['loaded_bytes'] / 1e9:.2f}",
            f"{figures['peak_bytes'] / 1e9:.2f}",
            f"{figures['largest_difference']:.1e}",
        )
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
