"""Reads and writes prepared data: groups of token ids in Parquet files, with the scores of their completions.

A group is a prompt with its completions. A score is the reference model's log-probability of a completion. The training
file is encoded in pieces, each a range of its lines. A part is the Parquet file with the groups of one piece. A
manifest lists the parts with their sha256.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
        "ratings": pa.list_(pa.float64()),  # one per completion; null: completions are in order, best first
        "weight": pa.float64(),
        "margin": pa.float64(),
        "line": pa.int64(),
        "others": pa.list_(pa.list_(pa.list_(pa.int32(), 2))),  # per completion, spans that are not learned; null: none
    }
)
SCORES = pa.schema(  # one per completion, in nats; null: not scored
    {"ref_logps": pa.list_(pa.float64()), "ref_head_logps": pa.list_(pa.float64())}
)

DIGEST = ".sha256"
Files = tuple[tuple[str, str], ...]  # of a part: each file's URI and sha256
READ_AT_ONCE = 8  # files; a bucket takes long to answer, but answers many requests at once


class DamagedPart(ValueError):
    """Raised if a file of prepared data is missing, or does not have the sha256 that the data's manifest names."""


class Part(Contract):
    """Describes a part: the Parquet file with the groups (prompts with completions) of one piece, a range of lines of
    the training file.

    The reference model's scores of these groups are in a file with the same name in another folder; `scores_sha256` is
    the sha256 of that file.
    """

    name: str
    num_rows: int  # rows of the piece
    num_groups: int  # groups that were kept of these rows; may be 0
    num_tokens: int  # tokens of completions and, each once, of prompts
    sha256: str
    scores_sha256: str | None = None


class Data(Protocol):
    """Prepared training data that workers read piece by piece. A piece is a range of lines of the training file.

    The object is a Dataset if all rows are encoded, and a Stream if rows are still being encoded.
    """

    @property
    def uri(self) -> str: ...
    @property
    def scores_uri(self) -> str | None: ...
    @property
    def num_rows(self) -> Sequence[int]: ...  # rows of each piece of the training file
    def take(self, pieces: Sequence[int]) -> Sequence[Part]: ...  # waits until all these pieces are encoded


class Dataset(Contract):
    """Lists the Parquet files of an encoded data file (`parts`). The groups (prompts with their completions) are in the
    folder `uri`, and the reference model's scores of the completions in the folder `scores_uri`."""

    uri: str
    parts: tuple[Part, ...]  # of a training file: one part for every piece, in the order of the file
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
    """Writes groups (prompts with completions) to the Parquet file `name` in the folder `uri`, and returns a
    description of the file.

    `num_rows` is the number of rows of the data file that the groups were made from; None means one row for each group.
    """
    table = pa.table({field: [getattr(group, field) for group in groups] for field in IDS.names}, IDS)
    num_tokens = sum(group.num_tokens for group in groups)
    sha256 = _write(storage.join(uri, name), table)
    num_rows = len(groups) if num_rows is None else num_rows
    return Part(name=name, num_rows=num_rows, num_groups=len(groups), num_tokens=num_tokens, sha256=sha256)


def write_scores(uri: str, part: Part, groups: Sequence[EncodedGroup], *, heads: bool = False) -> Part:
    """Writes the reference model's scores (log-probabilities) for the groups (prompts with their completions) of the
    file `part` to another file in the folder `uri`. `groups` are these groups, with the scores in them.

    Returns a copy of `part` that has the sha256 of the new file. The sha256 is also written to a small file beside it,
    because the manifest is written much later. With `heads`, the log-probability of each completion's head is written,
    too. A head is the first tokens of a completion that count in the loss, as many as the group's shortest completion
    has.
    """
    columns = {
        "ref_logps": [group.ref_logps for group in groups],
        "ref_head_logps": [group.ref_head_logps if heads else None for group in groups],
    }
    sha256 = _write(storage.join(uri, part.name), pa.table(columns, SCORES))
    storage.write_bytes(storage.join(uri, part.name + DIGEST), sha256.encode())
    return part.model_copy(update={"scores_sha256": sha256})


def find_scores(uri: str, part: Part) -> Part | None:
    """Looks in the folder `uri` for the file with the reference model's scores of a part (a file of groups). Returns a
    copy of `part` with the sha256 of the scores' file filled in. Returns None if the folder has no such file, or a
    damaged one."""
    try:
        sha256 = storage.read_bytes(storage.join(uri, part.name + DIGEST)).decode(errors="replace")
        _read_bytes(storage.join(uri, part.name), sha256)
    except (FileNotFoundError, DamagedPart):
        return None
    return part.model_copy(update={"scores_sha256": sha256})


def check(dataset: Dataset) -> None:
    """Raises DamagedPart if a file of the dataset is missing or was changed. Reads all files, several at a time."""
    files = [file for part in dataset.parts for file in files_of(dataset, part)]
    with ThreadPoolExecutor(READ_AT_ONCE) as threads:
        for _ in threads.map(_check_file, files):  # if one fails, those that wait are not read
            continue


def _check_file(file: tuple[str, str]) -> None:
    _read_bytes(*file)  # not returned, because a future would keep the bytes


def read_groups(dataset: Dataset) -> Iterator[EncodedGroup]:
    """Yields all groups (prompts with their completions) of the dataset in order. Raises DamagedPart if a file is
    missing or was changed."""
    for part in dataset.parts:
        yield from read_part(dataset, part)


def read_part(dataset: Dataset, part: Part) -> Iterator[EncodedGroup]:
    return read_numbered(dataset, [part], range(part.num_groups))


def read_numbered(data: Data, parts: Sequence[Part], numbers: Sequence[int]) -> Iterator[EncodedGroup]:
    """Yields the groups (prompts with their completions) in `parts`, files of prepared data, whose numbers are in
    `numbers`. The groups of all parts together are numbered in order, from 0.

    Raises DamagedPart if a file is missing or was changed.
    """
    with ThreadPoolExecutor(READ_AT_ONCE) as threads:
        tables = list(threads.map(read_table, [files_of(data, part) for part in parts if part.num_groups]))
    if tables:
        yield from _Groups(pa.concat_tables(tables)).take(numbers)


def _write(uri: str, table: Any) -> str:
    """Writes a table as a Parquet file to `uri`, and returns the file's sha256."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue()
    storage.write_bytes(uri, data)
    return hashlib.sha256(data).hexdigest()


def files_of(data: Data, part: Part) -> Files:
    """Returns two values for each file of a part of `data`: its URI and its sha256. A part has a file with its groups
    (prompts with their completions). If the groups have scores, it also has a file with the scores."""
    files = [(storage.join(data.uri, part.name), part.sha256)]
    if data.scores_uri is not None and part.scores_sha256 is not None:
        files.append((storage.join(data.scores_uri, part.name), part.scores_sha256))
    return tuple(files)


def read_table(files: Files) -> Any:
    """Returns the groups (prompts with their completions) of a part as a table. `files` are the files of the part.
    Raises DamagedPart if a file is missing or was changed."""
    table, *score_tables = (pq.read_table(pa.BufferReader(_read_bytes(*file))) for file in files)
    for scores in score_tables:
        for name in SCORES.names:
            table = table.append_column(name, scores[name])
    return table


def fields_of(columns: Mapping[str, Sequence[Any]], row: int) -> dict[str, Any]:
    """Returns the fields of the EncodedGroup (a prompt with its completions) in row number `row` of a table, without
    the token ids. `columns` are the columns of the table by name."""
    fields: dict[str, Any] = {"ref_logps": None} | {name: values[row] for name, values in columns.items()}
    for name in ("ref_logps", "ref_head_logps", "ratings"):
        if fields.get(name):
            fields[name] = tuple(fields[name])
    if fields.get("others"):
        fields["others"] = tuple(tuple(map(tuple, spans)) for spans in fields["others"])
    return fields


def _read_bytes(uri: str, sha256: str) -> bytes:
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError:
        raise DamagedPart(f"The file {uri} with prepared data is missing; prepare the data again.") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedPart(
            f"The file {uri} with prepared data does not have its recorded sha256; prepare the data again."
        )
    return data


class _Groups:
    """Reads groups (prompts with completions) from a table. A group is identified by the number of its row in the
    table.

    The class slices whole columns of token ids, because reading the lists of ids one by one from Arrow is 30 times
    slower.
    """

    def __init__(self, table: Any) -> None:
        self._prompts, self._completions = Lists(table["prompt_ids"]), Lists(table["completion_ids"])
        self._ids = Lists(self._completions.values)
        self._rest = {name: table[name].to_pylist() for name in table.column_names if not name.endswith("_ids")}

    def take(self, rows: Iterable[int]) -> Iterator[EncodedGroup]:
        for row in rows:
            completion_ids = tuple(self._ids.slice(i, i + 1).tolist() for i in range(*self._completions.bounds(row)))
            prompt_ids = self._prompts.slice(row, row + 1).tolist()
            yield EncodedGroup(prompt_ids=prompt_ids, completion_ids=completion_ids, **fields_of(self._rest, row))


class Lists:
    """Reads the lists in a column of an Arrow table. Arrow stores all lists of the column end to end, as one long
    array; a list is a slice of this array."""

    def __init__(self, column: Any) -> None:
        lists = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        self.values = lists.values
        self._offsets = lists.offsets.to_pylist()

    def bounds(self, row: int) -> tuple[int, int]:
        """Returns the start and the end (not included) of one row's list, in the array that joins the lists of all
        rows."""
        return self._offsets[row], self._offsets[row + 1]

    def slice(self, start: int, stop: int) -> Any:
        """Returns the numbers in the lists of several rows, as one array. The rows are those from number `start` up to,
        but not including, number `stop`."""
        return self._numbers[self._offsets[start] : self._offsets[stop]]

    @cached_property
    def _numbers(self) -> Any:
        return self.values.to_numpy()
