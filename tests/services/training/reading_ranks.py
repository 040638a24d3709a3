"""Reads prepared data as the ranks (workers) of a job do, and asserts that all of them together get exactly the groups
of the file's own reader, `read_numbered`: `reading_ranks.py <folder>`, with the address of a Ray cluster."""

import math
import random
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from dpo_core.config import TrainConfig
from dpo_core.encoding.encode import EncodedGroup, Outline
from dpo_core.policy.batch import plan
from dpo_core.training.load_ahead import load_ahead
from services.training.data.dataset import DamagedPart, Dataset, read_groups, write_part, write_scores
from services.training.data.row_order import global_batches, num_places, read_in_order
from services.training.data.row_reader import Rows, start_reader

BATCH_SIZE, NUM_EPOCHS = 7, 3


def group(kind: str, number: int) -> EncodedGroup:
    rng = random.Random(f"{kind} {number}")

    def ids() -> list[int]:
        return [rng.randrange(128_000) for _ in range(rng.randint(1, 20))]

    if kind == "pairs":
        scores = {"ref_logps": (-rng.random(), -rng.random()), "ref_head_logps": (-rng.random(), -rng.random())}
        return EncodedGroup(ids(), (ids(), ids()), line=number, **scores if number % 2 else {"ref_logps": (-1.0, 0.5)})
    if kind == "rankings":
        ratings = tuple(sorted((rng.random() for _ in range(rng.randint(2, 5))), reverse=True))
        completions, weight = tuple(ids() for _ in ratings), rng.choice([1.0, rng.random()])
        return EncodedGroup(ids(), completions, None, number, ratings=ratings, weight=weight)
    if kind == "unpaired":
        return EncodedGroup(ids(), (ids(), ids()), None, number, ratings=(float(number % 2), math.nan))
    others = (((0, 1), (2, 3)), ()) if number % 3 else None
    return EncodedGroup(ids(), ([1, 2, 3, 4], ids()), None, number, margin=number / 7, others=others)


def write(folder: Path, kind: str) -> Dataset:
    """Writes groups of a kind in 20 parts (files of groups), one of which is empty, so that there are three windows."""
    parts, first, uri, scores_uri = [], 1, str(folder / kind), str(folder / f"scores of {kind}")
    for i in range(20):
        groups = [group(kind, number) for number in range(first, first + (0 if i == 9 else 3 + i % 4))]
        part = write_part(uri, f"{i}.parquet", groups, num_rows=len(groups) + 1)
        parts.append(write_scores(scores_uri, part, groups, heads=True) if kind == "pairs" else part)
        first += len(groups)
    return Dataset(uri=uri, parts=tuple(parts), scores_uri=scores_uri if kind == "pairs" else None)


def share(batches: Iterator[list[EncodedGroup]], rows: Rows, rank: int, num_ranks: int) -> Iterator[dict[int, Any]]:
    """Yields the groups of each batch that a rank computes, by their place in the batch."""

    def own(groups: Sequence[EncodedGroup]) -> list[int]:
        lengths = [group.num_tokens for group in groups]
        return [i for pack in plan(lengths, num_ranks=num_ranks, max_tokens_per_pack=60)[rank] for i in pack]

    for batch in load_ahead(batches, rows.load, own):
        assert [i for i, group in enumerate(batch) if not isinstance(group, Outline)] == sorted(own(batch))
        yield {i: batch[i] for i in own(batch)}


def together(batches: Any, rows: Rows, num_ranks: int) -> Iterator[list[EncodedGroup]]:
    """Yields the batches, put together from the shares of all ranks."""
    for shares in zip(*(share(batches(), rows, rank, num_ranks) for rank in range(num_ranks)), strict=True):
        whole: dict[int, EncodedGroup] = {}
        for own in shares:
            assert not whole.keys() & own.keys()
            whole |= own
        yield [whole[i] for i in range(len(whole))]


def assert_same(found: Sequence[Any], expected: Sequence[Any]) -> None:
    assert len(found) == len(expected)
    for these, those in zip(found, expected, strict=True):
        assert repr(these) == repr(those)  # unlike ==, it takes a nan for a nan


def check_kind(folder: Path, kind: str, rows: Rows) -> None:
    data = write(folder, kind)
    config = TrainConfig(batch_size=BATCH_SIZE, n_epochs=NUM_EPOCHS).resolved(num_places(data, 0))
    expected = list(global_batches(data, config, after_step=0))
    assert len(expected) > 30
    batches = partial(global_batches, data, config, read=rows.outlines)
    assert_same(list(together(partial(batches, after_step=0), rows, 3)), expected)
    for step, num_ranks in ((11, 5), (20, 1), (len(expected), 2)):
        assert_same(list(together(partial(batches, after_step=step), rows, num_ranks)), expected[step:])
    outlines = list(read_in_order(data, rows.outlines))
    assert all(isinstance(outline, Outline) for outline in outlines)
    assert_same(rows.load(outlines), list(read_groups(data)))  # type: ignore[arg-type]


def check_death(folder: Path, reader: Any, rows: Rows) -> None:
    """The actor's process is killed while a rank reads. Ray starts another one, and the rank reads on."""
    data = write(folder, "rankings")
    config = TrainConfig(batch_size=BATCH_SIZE, n_epochs=NUM_EPOCHS).resolved(num_places(data, 0))
    expected = list(global_batches(data, config, after_step=0))
    found = together(partial(global_batches, data, config, after_step=0, read=rows.outlines), rows, 2)
    begun = list(islice(found, 2))
    for process in psutil.process_iter(["name"]):
        if process.info["name"].startswith("ray::RowReader"):
            process.kill()
    assert_same(begun + list(found), expected)


def check_damage(folder: Path, rows: Rows) -> None:
    """A file that is damaged is named; when it is whole again, the same actor reads it."""
    data, path = write(folder, "margins"), folder / "margins" / "3.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DamagedPart, match=r"3\.parquet"):
        list(read_in_order(data, rows.outlines))
    path.write_bytes(whole)
    assert len(list(read_in_order(data, rows.outlines))) == data.num_groups


if __name__ == "__main__":
    ray.init(address="auto", logging_level="ERROR")
    home, actor = Path(sys.argv[1]), start_reader()
    check_damage(home / "damage", Rows(actor))
    for each in ("pairs", "rankings", "unpaired", "margins"):
        check_kind(home, each, Rows(actor))
    check_death(home / "death", actor, Rows(actor))
