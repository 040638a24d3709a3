"""Prepared data: encoded groups in Parquet parts, and the reference's scores beside them.

Parts are named by their manifest with their sha256.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_core.encoding.encode import EncodedGroup
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
        "others": pa.list_(pa.list_(pa.list_(pa.int32(), 2))),  # per completion, spans of tokens; null: none
    }
)
SCORES = pa.schema(  # one per completion, in nats; null: not asked for
    {"ref_logps": pa.list_(pa.float64()), "ref_head_logps": pa.list_(pa.float64())}
)

DIGEST = ".sha256"


class DamagedPart(ValueError):
    """A part is not what the manifest says."""


class Part(Contract):
    """What became of a piece of a file: one Parquet file, and the one of its scores, which has the same name."""

    name: str
    num_rows: int  # of the piece
    num_groups: int  # that are left of them, maybe none
    num_tokens: int  # every prompt once and its completions
    sha256: str
    scores_sha256: str | None = None


class Data(Protocol):
    """What is read in the order of training: a Dataset, or one that is still being encoded."""

    @property
    def uri(self) -> str: ...
    @property
    def scores_uri(self) -> str | None: ...
    @property
    def num_rows(self) -> Sequence[int]: ...  # of each piece of the training file
    def take(self, pieces: Sequence[int]) -> Sequence[Part]: ...  # once all of them are there


class Dataset(Contract):
    """Parts in one folder, their scores in another."""

    uri: str
    parts: tuple[Part, ...]  # of the training file: one of every piece, in the order of the file
    scores_uri: str | None = None  # None: the objective needs no reference

    @property
    def num_groups(self) -> int:
        return sum(part.num_groups for part in self.parts)

    @property
    def num_tokens(self) -> int:
        return sum(part.num_tokens for part in self.parts)

    @property
    def num_rows(self) -> list[int]:
        return [part.num_rows for part in self.parts]

    def take(self, pieces: Sequence[int]) -> list[Part]:
        return [self.parts[piece] for piece in pieces]


def write_part(uri: str, name: str, groups: Sequence[EncodedGroup], *, num_rows: int | None = None) -> Part:
    """`num_rows` None: every row is a group."""
    table = pa.table({field: [getattr(group, field) for group in groups] for field in IDS.names}, IDS)
    num_tokens = sum(group.num_tokens for group in groups)
    sha256 = _write(storage.join(uri, name), table)
    num_rows = len(groups) if num_rows is None else num_rows
    return Part(name=name, num_rows=num_rows, num_groups=len(groups), num_tokens=num_tokens, sha256=sha256)


def write_scores(uri: str, part: Part, groups: Sequence[EncodedGroup], *, heads: bool = False) -> Part:
    """The part, now that its groups are scored, with `heads` their completions' beginnings too.

    Its sha256 stands beside the scores: the manifest comes much later.
    """
    columns = {
        "ref_logps": [group.ref_logps for group in groups],
        "ref_head_logps": [group.ref_head_logps if heads else None for group in groups],
    }
    sha256 = _write(storage.join(uri, part.name), pa.table(columns, SCORES))
    storage.write_bytes(storage.join(uri, part.name + DIGEST), sha256.encode())
    return part.model_copy(update={"scores_sha256": sha256})


def find_scores(uri: str, part: Part) -> Part | None:
    """The part, if scores of it stand in the folder `uri`, and are those that were written."""
    try:
        sha256 = storage.read_bytes(storage.join(uri, part.name + DIGEST)).decode(errors="replace")
        _read_bytes(storage.join(uri, part.name), sha256)
    except (FileNotFoundError, DamagedPart):
        return None
    return part.model_copy(update={"scores_sha256": sha256})


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
    return read_some(dataset, [part], range(part.num_groups))


def read_some(data: Data, parts: Sequence[Part], numbers: Sequence[int]) -> Iterator[EncodedGroup]:
    """Groups by their numbers, which go through all the parts. Raises DamagedPart."""
    tables = [_read(data, part) for part in parts if part.num_groups]
    if tables:
        yield from _Groups(pa.concat_tables(tables)).take(numbers)


def _write(uri: str, table: Any) -> str:
    """The file's sha256."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue()
    storage.write_bytes(uri, data)
    return hashlib.sha256(data).hexdigest()


def _files(data: Data, part: Part) -> Iterator[tuple[str, str]]:
    """Each with its sha256: the ids, then the scores, if there are any."""
    yield storage.join(data.uri, part.name), part.sha256
    if data.scores_uri is not None and part.scores_sha256 is not None:
        yield storage.join(data.scores_uri, part.name), part.scores_sha256


def _read(data: Data, part: Part) -> Any:
    table, *others = (pq.read_table(pa.BufferReader(_read_bytes(*file))) for file in _files(data, part))
    for scores in others:
        for name in SCORES.names:
            table = table.append_column(name, scores[name])
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
            own: dict[str, Any] = {"ref_logps": None}
            own |= {name: values[row] for name, values in self._rest.items()}
            for name in ("ref_logps", "ref_head_logps", "ratings"):
                if own.get(name):
                    own[name] = tuple(own[name])
            if own["others"]:
                own["others"] = tuple(tuple(map(tuple, spans)) for spans in own["others"])
            completion_ids = tuple(map(self._ids.ids, self._completions.places(row)))
            yield EncodedGroup(prompt_ids=self._prompts.ids(row), completion_ids=completion_ids, **own)


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
