import gzip
import io
import json
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_core.jsonl import InvalidRow
from services.containers import Reader, is_plain, json_lines

ROWS = [{"prompt": "Hi", "chosen": f"Hello {i}", "rejected": "é"} for i in range(2500)]
PLAIN = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS)
TABLE = pa.Table.from_pylist([row | {"score": None} for row in ROWS])


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(TABLE, sink)
    return sink.getvalue()


def arrow(kind: Callable[..., pa.ipc.RecordBatchStreamWriter]) -> bytes:
    sink = io.BytesIO()
    with kind(sink, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=700)
    return sink.getvalue()


PACKED = {
    "gzip": gzip.compress(PLAIN),
    "gzip of two members": gzip.compress(PLAIN[:5000]) + gzip.compress(PLAIN[5000:]),
    "zstd": pa.compress(PLAIN, codec="zstd", asbytes=True),
    "Parquet": parquet(),
    "an Arrow file": arrow(pa.ipc.new_file),
    "an Arrow stream": arrow(pa.ipc.new_stream),
}


@pytest.mark.parametrize("name", PACKED)
def test_whatever_a_file_is_packed_in_its_lines_are_the_same(name: str) -> None:
    file = io.BytesIO(PACKED[name])
    assert not is_plain(file)
    assert b"".join(json_lines(file)) == PLAIN
    assert not file.closed


def test_a_plain_file_is_read_as_it_is() -> None:
    file = io.BytesIO(PLAIN)
    assert is_plain(file)
    assert b"".join(json_lines(file)) == PLAIN
    assert is_plain(io.BytesIO())


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_damaged_file_is_refused(name: str, share: float) -> None:
    damaged = PACKED[name][: max(8, int(share * len(PACKED[name])))]
    with pytest.raises(InvalidRow, match="cannot be read beyond line") as refused:
        list(json_lines(io.BytesIO(damaged)))
    assert refused.value.code == "damaged_file"


def test_a_file_that_unpacks_without_end_is_refused() -> None:
    packed = pa.compress(b"\n" * 20_000_000, codec="zstd", asbytes=True)
    with pytest.raises(InvalidRow, match=f"more than 1000 times its {len(packed)} bytes"):
        for _ in json_lines(io.BytesIO(packed)):
            pass


def test_lines_are_a_file_again() -> None:
    assert io.BufferedReader(Reader(json_lines(io.BytesIO(PACKED["Parquet"])))).read() == PLAIN
