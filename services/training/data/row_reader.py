"""Lets each worker of a job read the token ids of only those groups that it trains on. A group is a prompt with its
completions.

The groups are stored in parts (Parquet files). A Ray actor, the RowReader, reads each part once for all workers. A
worker first gets the outlines of all groups; an outline is a group without its token ids. From the outlines, every
worker plans in the same way which worker computes which group. Then each worker asks the actor for the token ids of its
own groups.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.exceptions import ObjectLostError, RayActorError

from dpo_core.encoding.encode import EncodedGroup, Outline
from services.training.data.dataset import READ_AT_ONCE, Data, Files, Lists, Part, fields_of, files_of, read_table
from services.training.data.tasks import beside_training

CODEC, ID = "zstd", np.dtype(np.int32)
MOST_BYTES = 2**30  # of parts in the actor's memory: 100 parts of a common file, or four windows of the largest one
MOST_TRIES = 4  # of a call whose answer is lost because the actor dies, or a node with its objects


class Place(NamedTuple):
    """Says where a group (a prompt with its completions) is stored: the files of its part (a Parquet file of groups,
    perhaps with a file of scores), and the number of the group's row in these files."""

    files: Files
    row: int


@dataclass(frozen=True)
class Rows:
    """Reads prepared groups (prompts with their completions) for one worker, with the help of the job's actor `reader`.

    Each question to the actor is a function without arguments, which asks and returns the actor's answer. `wait_for`
    gets this function, calls it, and returns the answer. If storage does not answer, `wait_for` may call the function
    again.
    """

    reader: Any  # handle of the actor RowReader
    wait_for: Callable[[Callable[[], Any]], Any] = lambda ask: ask()

    def outlines(self, data: Data, parts: Sequence[Part], numbers: Sequence[int]) -> Iterator[Outline]:
        """Yields the outlines of the groups (prompts with their completions) with the given numbers. An outline is a
        group without its token ids. The groups of all `parts` (Parquet files) together are numbered in order, from 0.
        """
        files = [files_of(data, part) for part in parts if part.num_groups]
        tables = list(map(_table_of, self.wait_for(partial(self._ask_outlines, files)) if files else ()))
        places = [Place(part, row) for part, table in zip(files, tables, strict=True) for row in range(len(table))]
        if tables:
            yield from _outlines(pa.concat_tables(tables, promote_options="default"), places, numbers)

    def load(self, outlines: Sequence[Outline]) -> list[EncodedGroup]:
        """Returns the groups (prompts with their completions) of `outlines`, with their token ids, in the same order.
        An outline is a group without its token ids."""
        by_part: dict[Files, list[int]] = {}  # numbers of outlines
        for number, outline in enumerate(outlines):
            by_part.setdefault(outline.place.files, []).append(number)
        rows = [(files, [outlines[number].place.row for number in numbers]) for files, numbers in by_part.items()]
        in_order = list(chain.from_iterable(by_part.values()))
        groups = _filled([outlines[number] for number in in_order], self.wait_for(partial(self._ask_ids, rows)))
        by_number = dict(zip(in_order, groups, strict=True))
        return [by_number[number] for number in range(len(outlines))]

    def _ask_outlines(self, files: Sequence[Files]) -> list[bytes]:
        lost: list[str] = []
        for _ in range(MOST_TRIES):
            refs = _answer(self.reader.outlines.remote(files, lost))
            try:
                outlines: list[bytes] = ray.get(refs)
            except ObjectLostError as error:  # the actor died between the two calls, or a node lost the objects
                lost, last = [ref.hex() for ref in refs], error
            else:
                return outlines
        raise last

    def _ask_ids(self, rows: Sequence[tuple[Files, Sequence[int]]]) -> bytes:
        ids: bytes = _answer(self.reader.ids.remote(rows))
        return ids


def _answer(call: Any) -> Any:
    """Returns the actor's answer to a call. Raises RuntimeError if the actor dies each time that it tries to answer."""
    try:
        return ray.get(call)
    except RayActorError as error:
        what = f"The process that reads the job's prepared data died {MOST_TRIES} times while it read the same files"
        raise RuntimeError(f"{what}; if memory ran out, give its node more.") from error


def start_reader() -> Any:
    """Starts the actor RowReader, and returns its handle. The actor ends with the calling process.

    If the actor's process or node dies, Ray starts the actor again, maybe on another node, and repeats the calls that
    were not answered. Ray does not repeat a call during which the actor died MOST_TRIES times, because this call may be
    the reason for the deaths.
    """
    restarts = {"max_restarts": -1, "max_task_retries": MOST_TRIES - 1}
    return ray.remote(RowReader).options(**beside_training(), **restarts).remote()


class RowReader:
    """A Ray actor that reads parts (files of groups) for all workers of a job. It keeps nothing but the parts that were
    asked for last, so Ray can start it again anywhere."""

    def __init__(self) -> None:
        self._parts = OrderedDict[Files, asyncio.Future[_ReadPart]]()
        self._threads = ThreadPoolExecutor(READ_AT_ONCE)

    async def outlines(self, files: Sequence[Files], lost: Collection[str] = ()) -> list[Any]:
        """Reads parts (Parquet files of groups), and returns a Ray object reference for each part. The object is the
        table of the part's outlines, as bytes, and is stored once for all workers. An outline is a group without its
        token ids.

        `lost` has references, as hex, whose objects Ray no longer has. The parts of these references are read again.
        """
        for each in files:
            if (part := self._read_parts().get(each)) and part.outlines.hex() in lost:
                del self._parts[each]
        return [part.outlines for part in await asyncio.gather(*map(self._part, files))]

    async def ids(self, rows: Sequence[tuple[Files, Sequence[int]]]) -> bytes:
        """Returns the token ids of chosen groups, as compressed 32-bit numbers. A group is a prompt with its
        completions.

        `rows` has a pair for each part (a Parquet file of groups): the files of the part, and the numbers of the rows
        that are wanted from it. The ids are in the order of `rows`, row by row; the ids of a row's prompt come before
        those of its completions.
        """
        parts = await asyncio.gather(*(self._part(files) for files, _ in rows))
        ids = [part.ids(numbers) for part, (_, numbers) in zip(parts, rows, strict=True)]
        return bytes(pa.compress(np.concatenate([*chain(*ids)]), CODEC, asbytes=True))

    async def _part(self, files: Files) -> "_ReadPart":
        if files not in self._parts:
            self._parts[files] = asyncio.get_running_loop().run_in_executor(self._threads, _ReadPart, files)
            self._parts[files].add_done_callback(self._forget_oldest)
        self._parts.move_to_end(files)
        reading = self._parts[files]
        try:
            return await asyncio.shield(reading)
        except Exception:
            if self._parts.get(files) is reading:
                del self._parts[files]  # the next call reads again
            raise

    def _forget_oldest(self, _: object) -> None:
        """Forgets parts (files of groups) until the others take at most MOST_BYTES of memory. Begins with the parts
        that nobody has asked for in the longest time. The argument is not used."""
        parts = self._read_parts()
        surplus = sum(part.num_bytes for part in parts.values()) - MOST_BYTES
        for files, part in parts.items():
            if surplus <= 0:
                return
            del self._parts[files]
            surplus -= part.num_bytes

    def _read_parts(self) -> "dict[Files, _ReadPart]":
        done = {files: reading for files, reading in self._parts.items() if reading.done()}
        return {files: reading.result() for files, reading in done.items() if not reading.exception()}


class _ReadPart:
    """A part (a Parquet file of groups) that the actor RowReader has read: the token ids of its groups, and a reference
    to the table of its outlines (the groups without their token ids)."""

    def __init__(self, files: Files) -> None:
        table = read_table(files)
        self._prompts, self._completions = Lists(table["prompt_ids"]), Lists(table["completion_ids"])
        self._ids = Lists(self._completions.values)
        self.num_bytes = table.select(["prompt_ids", "completion_ids"]).nbytes
        self.outlines = ray.put(_outline_table(table))

    def ids(self, numbers: Iterable[int]) -> Iterator[Any]:
        """Yields two arrays of token ids for each row number in `numbers`: the ids of the row's prompt, and the ids of
        all its completions, one after the other."""
        for number in numbers:
            yield self._prompts.slice(number, number + 1)
            yield self._ids.slice(*self._completions.bounds(number))


def _outline_table(table: Any) -> bytes:
    """Returns the outlines of the groups (prompts with their completions) in `table`, as the compressed bytes of a
    table. An outline is a group without its token ids. It has the numbers of tokens instead, and all other columns that
    have a value."""
    completions = table["completion_ids"].combine_chunks()
    lengths = pa.ListArray.from_arrays(completions.offsets, pc.list_value_length(completions.values))
    columns = {"prompt_length": pc.list_value_length(table["prompt_ids"]), "completion_lengths": lengths}
    rest = {name: table[name] for name in table.column_names if not name.endswith("_ids")}
    outlines = pa.table(columns | {name: column for name, column in rest.items() if column.null_count < len(table)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, outlines.schema, options=pa.ipc.IpcWriteOptions(compression=CODEC)) as stream:
        stream.write_table(outlines)
    return bytes(sink.getvalue())


def _table_of(outlines: bytes) -> Any:
    return pa.ipc.open_stream(outlines).read_all()


def _outlines(table: Any, places: Sequence[Place], numbers: Iterable[int]) -> Iterator[Outline]:
    columns = {name: table[name].to_pylist() for name in table.column_names}
    prompts, completions = columns.pop("prompt_length"), columns.pop("completion_lengths")
    for number in numbers:
        yield Outline(
            prompt_ids=range(prompts[number]),
            completion_ids=tuple(map(range, completions[number])),
            place=places[number],
            **fields_of(columns, number),
        )


def _filled(outlines: Sequence[Outline], compressed: bytes) -> Iterator[EncodedGroup]:
    """Yields the groups of `outlines` with their token ids. An outline is a group (a prompt with its completions)
    without its token ids. `compressed` has the ids of all these groups, in the order of the outlines."""
    num_ids = sum(outline.num_tokens for outline in outlines)
    ids = np.frombuffer(pa.decompress(compressed, num_ids * ID.itemsize, CODEC), ID).tolist()
    ends = accumulate(map(len, chain.from_iterable((o.prompt_ids, *o.completion_ids) for o in outlines)), initial=0)
    pieces = (ids[start:stop] for start, stop in pairwise(ends))
    for outline in outlines:
        yield outline.with_ids(next(pieces), tuple(islice(pieces, len(outline.completion_ids))))
