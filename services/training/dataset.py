"""Prepared data: encoded groups in Parquet parts, the reference's scores beside them, and the order of training.

Parts are named by their manifest with their sha256. The order is a pure function of seed and epoch, and every worker
reads all of it, so global batches do not depend on the number of workers, and resuming is starting at a
later row.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_core.config import TrainConfig
from dpo_core.encode import EncodedGroup
from services import storage
from services.contract import Contract

IDS = pa.schema(
    {
        "prompt_ids": pa.list_(pa.int32()),
        "completion_ids": pa.list_(pa.list_(pa.int32())),
        "ratings": pa.list_(pa.float64()),  # one per completion; null: their order says it
        "weight": pa.float64(),
        "margin": pa.float64(),
        "line": pa.int64(),
    }
)
SCORES = pa.schema({"ref_logps": pa.list_(pa.float64())})  # one per completion, in nats
WINDOW_TOKENS = 2**26  # rows are shuffled within so much of an epoch: 256 MiB of ids in memory


class DamagedPart(ValueError):
    """A part is not what the manifest says."""


class Part(Contract):
    """One Parquet file, and the one of its scores, which has the same name."""

    name: str
    num_groups: int
    num_tokens: int  # every prompt once and its completions
    sha256: str
    scores_sha256: str | None = None


class Dataset(Contract):
    """Parts in one folder, their scores in another."""

    uri: str
    parts: tuple[Part, ...]
    scores_uri: str | None = None  # None: the objective needs no reference

    @property
    def num_groups(self) -> int:
        return sum(part.num_groups for part in self.parts)


def write_part(uri: str, name: str, groups: Sequence[EncodedGroup]) -> Part:
    table = pa.table({field: [getattr(group, field) for group in groups] for field in IDS.names}, IDS)
    num_tokens = sum(group.num_tokens for group in groups)
    sha256 = _write(storage.join(uri, name), table)
    return Part(name=name, num_groups=len(groups), num_tokens=num_tokens, sha256=sha256)


def write_scores(uri: str, part: Part, groups: Sequence[EncodedGroup]) -> Part:
    """The part, now that its groups are scored."""
    table = pa.table({"ref_logps": [group.ref_logps for group in groups]}, SCORES)
    return part.model_copy(update={"scores_sha256": _write(storage.join(uri, part.name), table)})


def find_scores(uri: str, part: Part) -> Part | None:
    """The part, if scores of it stand in the folder `uri`: a file appears whole or not at all."""
    try:
        data = storage.read_bytes(storage.join(uri, part.name))
    except FileNotFoundError:
        return None
    return part.model_copy(update={"scores_sha256": hashlib.sha256(data).hexdigest()})


def check(dataset: Dataset) -> None:
    """Raises DamagedPart if any part is not what it was."""
    for part in dataset.parts:
        for uri, sha256 in _files(dataset, part):
            _read_bytes(uri, sha256)


def read_groups(dataset: Dataset) -> Iterator[EncodedGroup]:
    """All groups, part by part. Raises DamagedPart."""
    for part in dataset.parts:
        yield from read_part(dataset, part)


def read_part(dataset: Dataset, part: Part) -> Iterator[EncodedGroup]:
    return _Groups(_read(dataset, part)).take(range(part.num_groups))


def num_steps(num_groups: int, config: TrainConfig) -> int:
    """Of the whole run. The last batch of an epoch may be smaller."""
    n_epochs, batch_size = _decided(config)
    return n_epochs * -(-num_groups // batch_size)


def global_batches(dataset: Dataset, config: TrainConfig, *, after_step: int) -> Iterator[list[EncodedGroup]]:
    """The groups of each optimizer step, beginning with the one after `after_step`."""
    n_epochs, batch_size = _decided(config)
    first_epoch, steps = divmod(after_step, num_steps(dataset.num_groups, config) // n_epochs)
    for epoch in range(first_epoch, n_epochs):
        groups = _epoch(dataset, config.seed, epoch, skip=steps * batch_size if epoch == first_epoch else 0)
        yield from batched(groups, batch_size)


def batched(groups: Iterator[EncodedGroup], batch_size: int) -> Iterator[list[EncodedGroup]]:
    """The last batch may be smaller."""
    while batch := list(islice(groups, batch_size)):
        yield batch


def _decided(config: TrainConfig) -> tuple[int, int]:
    if config.n_epochs is None or config.batch_size is None:
        raise ValueError("n_epochs and batch_size are not decided yet; resolve the config.")
    return config.n_epochs, config.batch_size


def _epoch(dataset: Dataset, seed: int, epoch: int, skip: int) -> Iterator[EncodedGroup]:
    for parts, rows in windows(dataset.parts, seed, epoch):
        if skip < len(rows):
            yield from _Groups(pa.concat_tables([_read(dataset, part) for part in parts])).take(rows[skip:])
        skip = max(0, skip - len(rows))


def windows(parts: Sequence[Part], seed: int, epoch: int) -> Iterator[tuple[list[Part], list[int]]]:
    """An epoch's order: parts shuffled, then the rows of as many parts as memory takes, shuffled.

    A row counts from the first row of its window's first part. Small data are one window.
    """
    generator = random.Random(f"{seed} {epoch}")  # a text is hashed alike everywhere
    left = list(parts)
    generator.shuffle(left)
    while left:
        window = [left.pop()]
        room = WINDOW_TOKENS - window[0].num_tokens
        while left and left[-1].num_tokens <= room:
            window.append(left.pop())
            room -= window[-1].num_tokens
        rows = list(range(sum(part.num_groups for part in window)))
        generator.shuffle(rows)
        yield window, rows


def _write(uri: str, table: Any) -> str:
    """The file's sha256."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue()
    storage.write_bytes(uri, data)
    return hashlib.sha256(data).hexdigest()


def _files(dataset: Dataset, part: Part) -> Iterator[tuple[str, str]]:
    """Each with its sha256: the ids, then the scores, if there are any."""
    yield storage.join(dataset.uri, part.name), part.sha256
    if dataset.scores_uri is not None and part.scores_sha256 is not None:
        yield storage.join(dataset.scores_uri, part.name), part.scores_sha256


def _read(dataset: Dataset, part: Part) -> Any:
    table, *others = (pq.read_table(pa.BufferReader(_read_bytes(*file))) for file in _files(dataset, part))
    for scores in others:
        table = table.append_column("ref_logps", scores["ref_logps"])
    return table


def _read_bytes(uri: str, sha256: str) -> bytes:
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError:
        raise DamagedPart(f"{uri} is missing; prepare the data again.") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedPart(f"{uri} has another sha256 than its manifest says; prepare the data again.")
    return data


class _Groups:
    """A table's rows by number. Ids are cut out of whole columns: asking Arrow for each list takes 30 times longer."""

    def __init__(self, table: Any) -> None:
        self._prompts, self._completions = _Lists(table["prompt_ids"]), _Lists(table["completion_ids"])
        self._ids = _Lists(self._completions.values)
        self._rest = {name: table[name].to_pylist() for name in table.column_names if not name.endswith("_ids")}

    def take(self, rows: Iterable[int]) -> Iterator[EncodedGroup]:
        for row in rows:
            own = {name: values[row] for name, values in self._rest.items()}
            per_completion = {name: own.get(name) and tuple(own[name]) for name in ("ref_logps", "ratings")}
            yield EncodedGroup(
                prompt_ids=self._prompts.ids(row),
                completion_ids=tuple(map(self._ids.ids, self._completions.places(row))),
                **own | per_completion,
            )


class _Lists:
    """A column of lists."""

    def __init__(self, column: Any) -> None:
        lists = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        self.values = lists.values
        self._offsets = lists.offsets.to_pylist()

    def places(self, row: int) -> range:
        """Where the row's values stand."""
        return range(self._offsets[row], self._offsets[row + 1])

    def ids(self, row: int) -> list[int]:
        ids: list[int] = self._numbers[self._offsets[row] : self._offsets[row + 1]].tolist()
        return ids

    @cached_property
    def _numbers(self) -> Any:
        return self.values.to_numpy()
