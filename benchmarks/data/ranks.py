"""Measures how much of a job's data each rank (process of a training run) reads, for different numbers of ranks.

Usage: `python benchmarks/data/ranks.py --groups 100000 --ranks 2 8 64 256`. The benchmark starts its own Ray cluster.

The ranks do not train: each reads the data of one epoch as a training worker does, and loads its share of every global
batch. Only rank 0 is measured, in a process of its own. A second process asks the Ray actor RowReader, which reads the
files for all ranks, for the shares of all other ranks.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray

from benchmarks.memory import peak
from dpo_core.config import TrainConfig
from dpo_core.encoding.encode import EncodedGroup, Outline
from dpo_core.policy.batch import plan
from dpo_core.training.load_ahead import AHEAD, load_ahead
from services.training.data.dataset import Dataset, write_part
from services.training.data.row_order import global_batches
from services.training.data.row_reader import Rows, start_reader

GROUPS_PER_PIECE = 5_000
BATCH_SIZE = 256  # groups of a global batch, for any number of ranks
MAX_TOKENS_PER_PACK = 8192
VOCABULARY = 32_000
PROMPT, COMPLETION = 83, 43  # mean numbers of tokens, those of `data_plane.py`'s rows
COLUMNS = (
    "ranks",
    "MB read by a rank",
    "of the data",
    "its share",
    "CPU s of a rank",
    "plan",
    "CPU s of the actor",
    "peak MB of a rank",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=100_000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 64, 256])
    options = parser.parse_args()
    ray.init(num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    with tempfile.TemporaryDirectory(prefix="raydpo-ranks-") as folder:
        dataset = _write(folder, options.groups)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        print(f"{dataset.num_groups} groups, {dataset.num_tokens / 1e6:.1f} M tokens, {size / 1e6:.1f} MB of Parquet")
        print(f"| {' | '.join(COLUMNS)} |")
        print("|---" * len(COLUMNS) + "|")
        for num_ranks in options.ranks:
            reader = start_reader()
            ray.get(reader.outlines.remote([]))  # it has started
            before = _cpu_seconds_of_reader()
            read, read_others = (ray.remote(num_cpus=1, max_calls=1)(work) for work in (_read, _read_others))
            rank = ray.get(read.remote(dataset, reader, num_ranks))
            ray.get(read_others.remote(dataset, reader, num_ranks))
            cpu_seconds = _cpu_seconds_of_reader() - before
            ray.kill(reader)
            share = rank["tokens"] / dataset.num_tokens
            print(
                f"| {num_ranks} | {rank['bytes'] / 1e6:.2f} | {rank['bytes'] / size:.3f} | {share:.4f} "
                f"| {rank['cpu_seconds']:.2f} | {rank['plan_seconds']:.2f} | {cpu_seconds:.2f} "
                f"| {rank['peak'] / 1e6:.0f} |",
                flush=True,
            )


def _write(folder: str, num_groups: int) -> Dataset:
    """Writes `num_groups` random groups (prompts with two completions each) as prepared data, and returns the
    dataset."""
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


def _read(dataset: Dataset, reader: Any, num_ranks: int) -> dict[str, Any]:
    """Reads one epoch as rank 0 of `num_ranks` ranks does. Returns a dictionary: the bytes and tokens that the rank
    got, its CPU seconds and its peak memory.

    `plan_seconds` has the CPU seconds for planning which rank computes which group. They are not a part of
    `cpu_seconds`, because a rank has to plan in any case.
    """
    config = TrainConfig(batch_size=BATCH_SIZE, n_epochs=1)
    tokens, received, plan_seconds = 0, 0, 0.0

    def count(ask: Callable[[], Any]) -> Any:
        nonlocal received
        answer = ask()
        received += sum(map(len, [answer] if isinstance(answer, bytes) else answer))
        return answer

    def own(groups: Sequence[EncodedGroup]) -> list[int]:
        nonlocal plan_seconds
        started = time.thread_time()
        packs = _plan(groups, num_ranks)[0]
        plan_seconds += time.thread_time() - started
        return [i for pack in packs for i in pack]

    rows = Rows(reader, count)
    rows.load(list(rows.outlines(dataset, dataset.parts[:1], [0])))  # imports what reading needs
    received, started = 0, time.process_time()
    batches = global_batches(dataset, config, after_step=0, read=rows.outlines)
    for batch in load_ahead(batches, rows.load, own):
        tokens += sum(group.num_tokens for group in batch if not isinstance(group, Outline))
    cpu_seconds = time.process_time() - started - plan_seconds
    return {
        "bytes": received,
        "cpu_seconds": cpu_seconds,
        "plan_seconds": plan_seconds,
        "tokens": tokens,
        "peak": peak(),
    }


def _read_others(dataset: Dataset, reader: Any, num_ranks: int) -> None:
    """Asks the actor `reader` for the shares of all ranks except rank 0, one rank after the other, for AHEAD batches at
    a time."""
    rows, config = Rows(reader), TrainConfig(batch_size=BATCH_SIZE, n_epochs=1)
    shares: list[list[Any]] = [[] for _ in range(num_ranks)]
    steps = -(-dataset.num_groups // BATCH_SIZE)
    for step, batch in enumerate(global_batches(dataset, config, after_step=0, read=rows.outlines), 1):
        for share, packs in zip(shares, _plan(batch, num_ranks), strict=True):
            share += [batch[i] for pack in packs for i in pack]
        if step % AHEAD == 0 or step == steps:
            for share in shares[1:]:
                rows.load(share)
            shares = [[] for _ in range(num_ranks)]


def _plan(groups: Sequence[EncodedGroup], num_ranks: int) -> list[list[list[int]]]:
    lengths = [group.num_tokens for group in groups]
    return plan(lengths, num_ranks=num_ranks, max_tokens_per_pack=MAX_TOKENS_PER_PACK)


def _cpu_seconds_of_reader() -> float:
    named = (process for process in psutil.Process().children(recursive=True) if "RowReader" in process.name())
    return sum(sum(process.cpu_times()[:2]) for process in named)


if __name__ == "__main__":
    main()
