"""Reads prepared data as the ranks (workers) of a job do, and asserts that all of them together get exactly the groups
of the file's own reader, `read_numbered`: `reading_ranks.py <folder>`, with the address of a Ray cluster."""

import asyncio
import math
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import ObjectLostError

from dpo_core.config import TrainConfig
from dpo_core.encoding.encode import EncodedGroup, Outline
from dpo_core.policy.batch import plan
from dpo_core.training.load_ahead import load_ahead
from services.training.data import row_reader
from services.training.data.dataset import (
    DamagedPart,
    Dataset,
    Files,
    files_of,
    read_groups,
    read_table,
    write_part,
    write_scores,
)
from services.training.data.row_order import global_batches, num_places, read_in_order
from services.training.data.row_reader import MOST_TRIES, RowReader, Rows, start_reader

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
    begun, pid = list(islice(found, 2)), pid_of(reader)
    os.kill(pid, signal.SIGKILL)
    assert_same(begun + list(found), expected)
    assert pid_of(reader) != pid


def pid_of(reader: Any) -> int:
    pid: int = ray.get(reader.__ray_call__.remote(lambda _: os.getpid()))
    return pid


@ray.remote(num_cpus=0)
class Owner:
    def put(self, count: int) -> list[Any]:
        return [ray.put(b"") for _ in range(count)]


def check_loss(folder: Path, reader: Any, rows: Rows) -> None:
    """Ray loses some outlines while the actor lives. The actor reads their files again, but not for the next rank."""
    data = write(folder, "margins")
    files = [files_of(data, part) for part in data.parts if part.num_groups]
    expected = list(read_in_order(data, rows.outlines))
    owner = Owner.remote()
    lost = ray.get(owner.put.remote(2))

    def lose(actor: RowReader, lost: Sequence[Any]) -> None:
        for each, ref in zip(files, lost, strict=False):
            actor._read_parts()[each].outlines = ref

    ray.get(reader.__ray_call__.remote(lose, lost))
    ray.kill(owner)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            ray.get(lost)
        except ObjectLostError:
            break
    assert_same(list(read_in_order(data, rows.outlines)), expected)
    found = ray.get(reader.outlines.remote(files))
    assert ray.get(reader.outlines.remote(files, [ref.hex() for ref in lost])) == found


class Dying(RowReader):
    """A reader that dies each time it is asked for ids. It has written a byte to the file `deaths` before."""

    deaths: Path

    async def ids(self, rows: object) -> bytes:
        with self.deaths.open("ab") as file:
            file.write(b".")
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def check_deaths(folder: Path) -> None:
    """An actor that dies at every try of a call is not started for ever: the call fails, and says why."""
    data, Dying.deaths = write(folder, "margins"), folder / "deaths"
    row_reader.RowReader = Dying  # type: ignore[misc]
    rows = Rows(start_reader())
    row_reader.RowReader = RowReader  # type: ignore[misc]
    outlines = list(rows.outlines(data, data.parts[:1], [0]))
    with pytest.raises(RuntimeError, match=f"prepared data died {MOST_TRIES} times"):
        rows.load(outlines)
    assert len(Dying.deaths.read_bytes()) == MOST_TRIES
    assert len(list(rows.outlines(data, data.parts[:1], [0]))) == 1  # it was started again, for other calls


def check_memory(folder: Path) -> None:
    """A call that needs many parts leaves all of them to the next call, if their bytes fit into the actor's memory."""
    groups = [group("margins", number) for number in range(1, 41)]
    parts = [write_part(str(folder), f"{each.line}.parquet", [each]) for each in groups]
    data, num_read = Dataset(uri=str(folder), parts=tuple(parts)), 0

    def read(files: Files) -> Any:
        nonlocal num_read
        num_read += 1
        return read_table(files)

    async def ask(times: int) -> list[int]:
        reader, held = RowReader(), []
        for _ in range(times):
            await reader.ids([(files_of(data, part), [0]) for part in parts])
            held.append(sum(part.num_bytes for part in reader._read_parts().values()))
        return held

    row_reader.read_table = read
    (needed,) = asyncio.run(ask(1))
    assert asyncio.run(ask(3)) == [needed] * 3
    assert num_read == 2 * len(parts)
    row_reader.MOST_BYTES = needed // 2
    assert all(needed // 4 < held <= needed // 2 for held in asyncio.run(ask(2)))


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
    check_loss(home / "loss", actor, Rows(actor))
    check_deaths(home / "deaths")
    check_memory(home / "memory")
