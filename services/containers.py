"""Reads a data file in any supported file format as JSON Lines.

The formats are plain, gzip and zstd JSON Lines, Parquet, and Arrow; the first bytes of a file identify its format. Each
row of a table becomes one line, without the row's null values.
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from itertools import chain
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_core.data.jsonl import InvalidRow, read_lines

Unpack = Callable[[io.RawIOBase], Iterator[bytes]]
CONTAINERS: dict[bytes, Unpack] = {
    b"\x1f\x8b": lambda file: _decompressed(file, "gzip"),
    b"\x28\xb5\x2f\xfd": lambda file: _decompressed(file, "zstd"),
    b"PAR1": lambda file: _rows(_parquet(file)),
    b"ARROW1": lambda file: _rows(_batches(pa.ipc.open_file(file))),
    b"\xff\xff\xff\xff": lambda file: _rows(pa.ipc.open_stream(file)),  # Hugging Face's `datasets` saves this format
}
ROWS_AT_A_TIME = 1000
BYTES_AT_A_TIME = 2**26
MAX_EXPANSION = 1000  # a file may unpack to so many times its size; real text does not compress that well


def is_plain(file: BinaryIO) -> bool:
    """Whether the file is JSON Lines without compression. The caller must open the file at its start; the function
    leaves it at its start."""
    return _unpacker(file) is None


def json_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yields the file's rows as lines of JSON. The file may be in any supported format, such as Parquet or compressed
    JSON Lines.

    Raises InvalidRow if the file is damaged or unpacks to more than MAX_EXPANSION times its size.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    number = total = 0
    try:
        for number, line in enumerate(_lines(file), 1):
            total += len(line)
            if total > MAX_EXPANSION * size:
                message = (
                    f"The compressed file unpacks to more than {MAX_EXPANSION} times its {size} bytes; "
                    "send the unpacked file."
                )
                raise InvalidRow(number, "", "file_too_large", message)
            yield line
    except (OSError, UnicodeDecodeError, KeyError, pa.ArrowException) as error:
        # The library's text may quote the file, and the database stores no NUL.
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200].replace("\0", "\ufffd")
        message = f"The file is damaged after line {number} ({reason}); write the file again."
        raise InvalidRow(number + 1, "", "damaged_file", message) from None


def _lines(file: BinaryIO) -> Iterator[bytes]:
    unpack = _unpacker(file)
    return read_lines(file) if unpack is None else unpack(_KeptOpen(file))


def _unpacker(file: BinaryIO) -> Unpack | None:
    start = file.read(8)
    file.seek(0)
    return next((unpack for magic, unpack in CONTAINERS.items() if start.startswith(magic)), None)


def _decompressed(file: io.RawIOBase, compression: str) -> Iterator[bytes]:
    unpacked: Any = pa.CompressedInputStream(file, compression)
    return read_lines(io.BufferedReader(unpacked))


def _batches(file: Any) -> Iterator[Any]:
    return (file.get_batch(i) for i in range(file.num_record_batches))


def _parquet(file: io.RawIOBase) -> Iterator[Any]:
    """Yields the record batches of a Parquet file.

    Texts are read dictionary-encoded, so that a long text which is repeated is in memory only once in a batch.
    """
    columns = pq.ParquetFile(file).schema
    texts = [column.path for column in map(columns.column, range(len(columns))) if column.physical_type == "BYTE_ARRAY"]
    batches: Iterator[Any] = pq.ParquetFile(file, read_dictionary=texts).iter_batches(ROWS_AT_A_TIME)
    return batches


def _rows(batches: Iterable[Any]) -> Iterator[bytes]:
    for row in chain.from_iterable(map(_dictionaries, batches)):
        present = {name: value for name, value in row.items() if value is not None}
        yield json.dumps(present, ensure_ascii=False, default=_as_json).encode() + b"\n"


def _as_json(value: object) -> object:
    """Converts a value of a table that JSON cannot hold, and returns the JSON value.

    Decimals become floats. Dates, and bytes in UTF-8, become text. Other bytes become {"bytes": <their number>}.
    """
    if isinstance(value, Decimal):
        return float(value)
    if not isinstance(value, bytes):
        return str(value)
    try:
        text = value.decode()
    except UnicodeDecodeError:
        text = "\0"
    return {"bytes": len(value)} if "\0" in text else text


def _dictionaries(batch: Any) -> Iterator[dict[str, Any]]:
    """Yields the rows of an Arrow record batch as dictionaries.

    Converts a few rows at a time, to save memory. In Arrow columns with dictionary or run-end encoding, many rows refer
    to one stored value. Conversion copies this value into each row, so a single converted row may need as much memory
    as the whole batch.
    """
    _refuse_unwritable(pa.struct(list(batch.schema)))
    step = max(1, min(ROWS_AT_A_TIME, BYTES_AT_A_TIME // max(1, batch.get_total_buffer_size())))
    for start in range(0, batch.num_rows, step):
        yield from batch.slice(start, step).to_pylist(maps_as_pydicts="strict")


def _refuse_unwritable(kind: Any, *, shared: bool = False) -> None:
    """Raises an ArrowException if values of the Arrow type `kind` cannot be written as JSON, or if two fields of `kind`
    have the same name, as two columns of a table may have.

    `shared` says that many rows refer to one stored value, as in Arrow columns with dictionary or run-end encoding.
    Such values must not be lists or structs, because writing each of them once for every row would multiply the size of
    the JSON at each level of lists.
    """
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind) or (shared and kind.num_fields):
        raise pa.ArrowNotImplementedError(f"a column has the type {kind}, which cannot be written as JSON lines")
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        _refuse_unwritable(kind.value_type, shared=True)
        return
    names = set[str]()
    for field in map(kind.field, range(kind.num_fields)):
        if field.name in names:
            raise pa.ArrowInvalid(f"two columns are called {field.name}")
        names.add(field.name)
        _refuse_unwritable(field.type)


class _KeptOpen(io.RawIOBase):
    """A reader of `file` that does not close `file` when Arrow closes the reader."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


class Reader(io.RawIOBase):
    """A readable binary file whose content is the given lines, one after the other."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._left = self._left or next(self._lines, b"")
        taken, self._left = self._left[: len(buffer)], self._left[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)
