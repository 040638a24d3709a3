"""Measures what each rank (process of a training run) reads of a job's data, for different numbers of ranks.

Usage: `python benchmarks/data/ranks.py --groups 100000 --ranks 2 8 64 256`. The ranks do not train: each reads an
epoch as a training worker does, and keeps its share of each global batch. One rank of each run is measured, in a new
process; what it reads does not depend on the other ranks.
"""

import argparse
import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil

from benchmarks.memory import peak
from dpo_core.config import TrainConfig
from dpo_core.encoding.encode import EncodedGroup
from services.training.data.dataset import Dataset, write_part
from services.training.data.row_order import global_batches

GROUPS_PER_PIECE = 5_000
BATCH_SIZE = 256  # groups of a global batch, for any number of ranks
VOCABULARY = 32_000
PROMPT, COMPLETION = 83, 43  # mean numbers of tokens, those of `data_plane.py`'s rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=100_000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 64, 256])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raydpo-ranks-") as folder:
        dataset = _write(folder, options.groups)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        print(f"{dataset.num_groups} groups, {dataset.num_tokens / 1e6:.1f} M tokens, {size / 1e6:.1f} MB of Parquet")
        print(
            "| ranks | MB read by a rank | of the data | its share | CPU s of a rank | CPU s of all ranks | peak MB |"
        )
        print("|---|---|---|---|---|---|---|")
        for num_ranks in options.ranks:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                told = pool.submit(_read, dataset, num_ranks).result()
            print(
                f"| {num_ranks} | {told['bytes'] / 1e6:.1f} | {told['bytes'] / size:.2f} "
                f"| {told['tokens'] / dataset.num_tokens:.4f} | {told['cpu_seconds']:.2f} "
                f"| {told['cpu_seconds'] * num_ranks:.0f} | {told['peak'] / 1e6:.0f} |"
            )


def _write(folder: str, num_groups: int) -> Dataset:
    """Writes random groups (prompts with two completions each) as prepared data, and returns the dataset."""
    rng = random.Random(0)

    def ids(mean: int) -> list[int]:
        count = max(1, round(mean * rng.lognormvariate(-0.18, 0.6)))
        return [min(VOCABULARY - 1, int(rng.paretovariate(0.5))) for _ in range(count)]  # as words are: few are common

    parts = []
    for number, start in enumerate(range(0, num_groups, GROUPS_PER_PIECE)):
        lines = range(start, min(start + GROUPS_PER_PIECE, num_groups))
        groups = [EncodedGroup(ids(PROMPT), (ids(COMPLETION), ids(COMPLETION)), None, line) for line in lines]
        parts.append(write_part(folder, f"{number:05d}.parquet", groups))
    return Dataset(uri=folder, parts=tuple(parts))


def _read(dataset: Dataset, num_ranks: int) -> dict[str, Any]:
    """Reads an epoch as rank 0 of `num_ranks` does, and returns what that took."""
    config = TrainConfig(batch_size=BATCH_SIZE, n_epochs=1)
    one_part = dataset.model_copy(update={"parts": dataset.parts[:1]})
    next(global_batches(one_part, config, after_step=0))  # imports what reading needs
    process, tokens = psutil.Process(), 0
    before, started = process.io_counters().read_chars, time.process_time()
    for batch in global_batches(dataset, config, after_step=0):
        tokens += sum(group.num_tokens for group in batch[::num_ranks])
    return {
        "bytes": process.io_counters().read_chars - before,
        "cpu_seconds": time.process_time() - started,
        "tokens": tokens,
        "peak": peak(),
    }


if __name__ == "__main__":
    main()
