"""Scoring the reference: a Ray Serve deployment, as a job uses it, against vLLM's own offline `LLM.generate`.

    python benchmarks/scoring.py --rows 256 --mean-length 256 --repeats 3 --json results.json

The same rows of random ids, pairs of a prompt and two completions; the same weights, a random Llama of 11M unless
`--model` names a folder. Columns run one after the other, forth and back, each in a process of its own: an engine is
loaded, warmed up with sixteen rows, timed once on all, and stopped; figures are medians. Ours reads the encoded
rows from Parquet, asks through the application's handle, and writes the sums; of vLLM only `generate` is timed. Loading
is in no figure. With `--longest` every row is as long as the model takes, less the one token that
`generate` must make. Peaks are of the replica and its engine, or of the offline process and its engine.
It runs on CPUs.
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
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # or threads that wait spin, and Ray's processes with them
os.environ.pop("OMP_NUM_THREADS", None)  # each engine decides for itself
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.engines import COLUMNS, OURS, Figures
from demo.base_model import make_base_model
from dpo_core.encoding.encode import EncodedGroup
from services.training.data.dataset import Dataset, write_part

ROWS_PER_PART = 1000  # as the pieces of an encoded file
WARM_ROWS = 16


def main() -> None:
    args = _arguments()
    if args.column:
        print("RESULT " + json.dumps(COLUMNS[args.column](args)))
        return
    runs: dict[str, list[Figures]] = {name: [] for name in COLUMNS}
    with tempfile.TemporaryDirectory(prefix="raydpo-bench-") as folder:
        args.folder = Path(folder)
        num_tokens = _prepare(args)
        for repeat in range(args.repeats):
            for name in COLUMNS if repeat % 2 == 0 else reversed(COLUMNS):
                runs[name].append(_in_its_own_process(args, name, num_tokens))
                print(f"{name}: {runs[name][-1]}", flush=True)
        medians = {name: _median(found) for name, found in runs.items()}
        for name in COLUMNS:
            medians[name]["largest_difference"] = _largest_difference(args.folder, name)
    print(f"\n{args.rows} rows, {num_tokens:,} tokens, {args.dtype}, {os.cpu_count()} cores")
    _print_table(medians)
    if args.json:
        names = ("rows", "mean_length", "longest", "dtype", "hidden_size", "layers")
        asked = {name: getattr(args, name) for name in names} | {"tokens": num_tokens}
        args.json.write_text(json.dumps({"arguments": asked, "medians": medians, "runs": runs}, indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder with weights; else a random Llama")
    parser.add_argument("--hidden-size", type=int, default=256, help="of the random Llama, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4, help="of the random Llama")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rows", type=int, default=256, help="pairs: each is scored as two sequences")
    parser.add_argument("--mean-length", type=int, default=256, help="tokens of a prompt and one completion")
    parser.add_argument("--longest", action="store_true", help="all rows at the model's limit instead")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write every figure")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--column", help=argparse.SUPPRESS)
    return parser.parse_args()


def _prepare(args: argparse.Namespace) -> int:
    """The model and the rows of all runs; how many tokens the rows have, prompts once for each completion."""
    from transformers import AutoConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if args.model is None:
        args.model = args.folder / "model"
        text = ["".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ", k=10_000))]
        make_base_model(args.model, text, hidden_size=args.hidden_size, num_layers=args.layers, vocabulary=32_000)
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
    """Log-normal lengths; a prompt has three fifths of a row."""
    rng = random.Random(0)

    def ids(share: float) -> list[int]:
        mean = share * mean_length * rng.lognormvariate(-(spread**2) / 2, spread)
        return rng.choices(range(vocabulary), k=max(1, min(round(mean), int(share * limit))))

    return [EncodedGroup(ids(0.6), (ids(0.4), ids(0.4)), None, line) for line in range(1, num_rows + 1)]


def _in_its_own_process(args: argparse.Namespace, column: str, num_tokens: int) -> Figures:
    given = [f"--model={args.model}", f"--dtype={args.dtype}", f"--folder={args.folder}"]
    run = subprocess.run([sys.executable, __file__, *given, "--column", column], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{column} failed:\n{run.stderr}")
    found: Figures = json.loads(run.stdout.rpartition("RESULT ")[2])
    return found | {"tokens_per_second": num_tokens / found["seconds"]}


def _median(runs: list[Figures]) -> Figures:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def _largest_difference(folder: Path, column: str) -> float:
    """Of a completion's sum from ours, in nats, in the last runs."""
    sums, ours = (json.loads((folder / f"{name}.sums.json").read_text()) for name in (column, OURS))
    return max(abs(one - other) for one, other in zip(sums, ours, strict=True))


def _print_table(medians: dict[str, Figures]) -> None:
    ours = medians[OURS]
    head = ("seconds", "tokens/s", "ours is", "loaded GB", "peak GB", "sums differ")
    print(f"{'':24}" + "".join(f"{title:>14}" for title in head))
    for name, found in medians.items():
        cells = (
            f"{found['seconds']:.2f}",
            f"{found['tokens_per_second']:,.0f}",
            f"{ours['tokens_per_second'] / found['tokens_per_second']:.2f} x",
            f"{found['loaded_bytes'] / 1e9:.2f}",
            f"{found['peak_bytes'] / 1e9:.2f}",
            f"{found['largest_difference']:.1e}",
        )
        print(f"{name:24}" + "".join(f"{cell:>14}" for cell in cells))


if __name__ == "__main__":
    main()
