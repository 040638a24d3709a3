"""Prepared data: encoded groups in Parquet parts, and the order in which training reads them.

`run_uri/prepared/manifest.json` is written last and names each part with its sha256. The order is a pure function of
seed and epoch, and every worker reads all of it, so global batches do not depend on the number of
workers, and resuming is starting at a later row.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpo_core.config import TrainConfig
from dpo_core.encode import EncodedGroup
from services import storage
from services.contract import Contract

SCHEMA = pa.schema(
    {
        "prompt_ids": pa.list_(pa.int32()),
        "completion_ids": pa.list_(pa.list_(pa.int32())),
        "ref_logps": pa.list_(pa.float64()),  # one per completion, in nats; null: the objective needs no reference
        "ratings": pa.list_(pa.float64()),  # one per completion; null: their order says it
        "weight": pa.float64(),
        "margin": pa.float64(),
        "line": pa.int64(),
    }
)
WINDOW_TOKENS = 2**26  # rows are shuffled within so much of an epoch: 256 MiB of ids in memory


class DamagedPart(ValueError):
    """A part is not what the manifest says."""


class Part(Contract):
    """One Parquet file."""

    name: str
    num_groups: int
    num_tokens: int  # every prompt once and its completions
    sha256: str


class Dataset(Contract):
    """Parts in one folder; also the manifest."""

    uri: str
    parts: tuple[Part, ...]

    @property
    def num_groups(self) -> int:
        return sum(part.num_groups for part in self.parts)


def find(uri: str) -> Dataset | None:
    """The prepared data at `uri`, every part checked; None where none is complete. Raises DamagedPart."""
    manifest = storage.join(uri, storage.MANIFEST)
    if not storage.exists(manifest):
        return None
    dataset = Dataset.model_validate_json(storage.read_bytes(manifest))
    for part in dataset.parts:
        _read(dataset.uri, part)
    return dataset


def save(dataset: Dataset, uri: str) -> None:
    """Makes `dataset` the prepared data of `uri`."""
    storage.write_bytes(storage.join(uri, storage.MANIFEST), dataset.model_dump_json().encode())


def write_part(uri: str, name: str, groups: Sequence[EncodedGroup]) -> Part:
    rows = [{name: getattr(group, name) for name in SCHEMA.names} for group in groups]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    storage.write_bytes(storage.join(uri, name), data)
    return Part(
        name=name,
        num_groups=len(groups),
        num_tokens=sum(group.num_tokens for group in groups),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def read_groups(dataset: Dataset) -> Iterator[EncodedGroup]:
    """All groups, part by part. Raises DamagedPart."""
    for part in dataset.parts:
        table = _read(dataset.uri, part)
        yield from (_group(table, row) for row in range(table.num_rows))


def first_margin(dataset: Dataset) -> int | None:
    """The line of the first group that has a margin; None where none has. Raises DamagedPart."""
    for part in dataset.parts:
        table = _read(dataset.uri, part)
        if table["margin"].null_count < table.num_rows:
            return int(table.filter(pc.is_valid(table["margin"]))["line"][0].as_py())
    return None


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
        while batch := list(islice(groups, batch_size)):
            yield batch


def _decided(config: TrainConfig) -> tuple[int, int]:
    if config.n_epochs is None or config.batch_size is None:
        raise ValueError("n_epochs and batch_size are not decided yet; resolve the config.")
    return config.n_epochs, config.batch_size


def _epoch(dataset: Dataset, seed: int, epoch: int, skip: int) -> Iterator[EncodedGroup]:
    for parts, rows in windows(dataset.parts, seed, epoch):
        if skip < len(rows):
            table = pa.concat_tables([_read(dataset.uri, part) for part in parts]).combine_chunks()
            yield from (_group(table, row) for row in rows[skip:])
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
        while left and sum(part.num_tokens for part in window) + left[-1].num_tokens <= WINDOW_TOKENS:
            window.append(left.pop())
        rows = list(range(sum(part.num_groups for part in window)))
        generator.shuffle(rows)
        yield window, rows


def _read(uri: str, part: Part) -> pa.Table:
    where = storage.join(uri, part.name)
    try:
        data = storage.read_bytes(where)
    except FileNotFoundError:
        raise DamagedPart(f"{where} is missing; prepare the data again.") from None
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise DamagedPart(f"{where} has another sha256 than its manifest says; prepare the data again.")
    return pq.read_table(pa.BufferReader(data))


def _group(table: Any, row: int) -> EncodedGroup:
    values = dict(zip(SCHEMA.names, (column[row].as_py() for column in table.columns), strict=True))
    per_completion = ("completion_ids", "ref_logps", "ratings")
    return EncodedGroup(**values | {name: values[name] and tuple(values[name]) for name in per_completion})
