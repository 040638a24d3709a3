import gzip
import io
import json
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_core.data.jsonl import InvalidRow
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
    with pytest.raises(InvalidRow, match="is damaged after line") as refused:
        list(json_lines(io.BytesIO(damaged)))
    assert refused.value.code == "damaged_file"


def test_a_file_that_unpacks_without_end_is_refused() -> None:
    packed = pa.compress(b"\n" * 20_000_000, codec="zstd", asbytes=True)
    with pytest.raises(InvalidRow, match=f"more than 1000 times its {len(packed)} bytes"):
        for _ in json_lines(io.BytesIO(packed)):
            pass


def test_lines_are_a_file_again() -> None:
    assert io.BufferedReader(Reader(json_lines(io.BytesIO(PACKED["Parquet"])))).read() == PLAIN


# --- bombs ---


def packed(table: pa.Table, kind: str) -> bytes:
    sink = io.BytesIO()
    if kind == "Parquet":
        pq.write_table(table, sink, compression="zstd")
    else:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
            writer.write_table(table)
    return sink.getvalue()


def shared(depth: int) -> pa.Array:
    """Returns an array of one row with 1000 ** depth texts, in a few kilobytes, because its lists share their
    values."""
    values = pa.array(["x"] * 1000)
    for _ in range(depth):
        values = pa.ListViewArray.from_arrays(
            pa.array([0] * 1000, pa.int32()), pa.array([1000] * 1000, pa.int32()), values
        )
    return values


def repeated() -> pa.Array:
    """Returns an array that has a text of 8 MB 100,000 times, in 8 MB."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["x" * 2**23]))


def endless() -> pa.Array:
    return pa.RunEndEncodedArray.from_arrays(pa.array([10**9], pa.int32()), pa.array(["x"]))


def nested(depth: int) -> pa.Array:
    values = pa.array(["x"])
    for _ in range(depth):
        values = pa.RunEndEncodedArray.from_arrays(pa.array([1], pa.int32()), pa.array([values.to_pylist()]))
    return values


BOMBS = {
    "Parquet that repeats a text": lambda: packed(pa.table({"prompt": repeated()}), "Parquet"),
    "Arrow that repeats a text": lambda: packed(pa.table({"prompt": repeated()}), "Arrow"),
    "Arrow of nulls": lambda: packed(pa.table({"prompt": pa.nulls(10**9)}), "Arrow"),
    "Arrow of one run": lambda: packed(pa.table({"prompt": endless()}), "Arrow"),
    "Arrow whose lists share their elements": lambda: packed(pa.table({"prompt": shared(4)}), "Arrow"),
    "Arrow whose runs are lists": lambda: packed(pa.table({"prompt": nested(1)}), "Arrow"),
    "gzip of gigabytes": lambda: gzip.compress(b"x" * 2**20) * 1000,
    "zstd of one line": lambda: pa.compress(b"x" * 2**27, codec="zstd", asbytes=True),
}
READ = """
import resource, sys, time
from services.containers import json_lines
from dpo_core.data.survey import survey
def megabytes(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, start = megabytes(), time.process_time()
print(survey(json_lines(open(sys.argv[1], "rb"))).refusal)
print(megabytes() - before, time.process_time() - start)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_and_costs_bounded_memory_and_time(name: str, tmp_path: Path) -> None:
    (tmp_path / "bomb").write_bytes(BOMBS[name]())
    command = [sys.executable, "-c", READ, str(tmp_path / "bomb")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500)
    refusal, costs = done.stdout.splitlines()
    megabytes, seconds = map(float, costs.split())
    assert refusal != "None"
    assert len(refusal) < 600
    assert megabytes < 600
    assert seconds < 60


def test_a_text_that_is_no_unicode_is_refused() -> None:
    offsets = pa.array([0, 2], pa.int32()).buffers()[1]
    text = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xff\xfe")])
    for kind in ("Parquet", "Arrow"):
        with pytest.raises(InvalidRow, match=r"is damaged after line 0 \('utf-8' codec"):
            list(json_lines(io.BytesIO(packed(pa.table({"prompt": text}), kind))))


def test_what_tables_hold_and_json_does_not_is_read_as_it_is_meant() -> None:
    called = pa.array([[("city", "Paris")]], pa.map_(pa.string(), pa.string()))
    table = pa.table(
        {
            "prompt": pa.array(["é?".encode()]),  # as writers that mark no texts
            "messages": pa.array([[{"role": b"user", "content": b"Hi"}]]),
            "score": pa.array([Decimal("9.50")]),
            "arguments": called,
            "embedding": pa.array([b"\xff\x00"]),
            "key": pa.array([b"a\x00"]),
            "made_at": pa.array([datetime(2026, 11, 30)]),
        }
    )
    (line,) = json_lines(io.BytesIO(packed(table, "Parquet")))
    assert json.loads(line) == {
        "prompt": "é?",
        "messages": [{"role": "user", "content": "Hi"}],
        "score": 9.5,
        "arguments": {"city": "Paris"},
        "embedding": {"bytes": 2},
        "key": {"bytes": 2},
        "made_at": "2026-11-30 00:00:00",
    }


TWINS = pa.array([("a", "b")], pa.struct([("role", pa.string()), ("role", pa.string())]))


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (
            pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], ["prompt", "prompt"]),
            "two columns are called prompt",
        ),
        (pa.table({"messages": pa.ListArray.from_arrays([0, 1], TWINS)}), "two columns are called role"),
        (pa.table({"m": pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int64()))}), "a"),
    ],
    ids=["columns", "fields", "keys of a map"],
)
def test_what_a_table_says_twice_is_refused(table: pa.Table, reason: str) -> None:
    with pytest.raises(InvalidRow, match=f"is damaged after line 0 .*{reason}.*; write the file again"):
        list(json_lines(io.BytesIO(packed(table, "an Arrow stream"))))


def test_texts_that_a_table_keeps_as_dictionaries_are_texts() -> None:
    messages = [[{"role": "user", "content": "Hi"}], [{"role": "user", "content": "Ho"}]] * 1500
    rows = [{"messages": each, "note": "same"} for each in messages]
    lines = list(json_lines(io.BytesIO(packed(pa.Table.from_pylist(rows), "Parquet"))))
    assert [json.loads(line) for line in lines] == rows
