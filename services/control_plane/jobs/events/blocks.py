"""Converts the metrics of a job's training steps to compact bytes, and adds them up over ranges of steps.

A block is an Arrow table with a row for each of up to BLOCK_STEPS steps of a job. It is stored as Parquet with the
encoding BYTE_STREAM_SPLIT, which keeps each float64 exactly. Most values were float32 when training reported them; this
encoding stores such values in little space.

The database also stores the block's sums. For each metric and each SUM_STEPS steps they have the number of values,
their sum, and the least, greatest and last value. A chart of many steps needs the sums only.
"""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

BLOCK_STEPS = 1000  # block number n of a job has the steps from n * BLOCK_STEPS + 1
SUM_STEPS = 100
METRIC = "metric:"  # begins the names of the columns that hold metrics
FIXED = {"event_id": pa.int64(), "created_at": pa.int64(), "step": pa.int32(), "total_steps": pa.int32()}
SUMS = pa.schema(
    [
        ("step", pa.int32()),  # the last step that was added
        ("metric", pa.string()),
        ("count", pa.int32()),
        *((name, pa.float64()) for name in ("sum", "min", "max", "last")),
    ]
)


def number_of(step: int) -> int:
    """Returns the number, from 0, of the block (a table of up to BLOCK_STEPS training steps) that holds the step
    `step`."""
    return (step - 1) // BLOCK_STEPS


def block_of(events: Sequence[Any]) -> pa.Table:
    """Returns a block, which is a table with a row for each training step, of the metrics in `events`. `events` are
    rows of the database table `events`, sorted by step; each tells the metrics of one step.
    """
    told = [event.data or {} for event in events]
    names = sorted({name for data in told for name in data} - FIXED.keys())
    columns: dict[str, pa.Array] = {
        "event_id": pa.array([event.id for event in events], FIXED["event_id"]),
        "created_at": pa.array([int(event.created_at.timestamp()) for event in events], FIXED["created_at"]),
        "step": pa.array([event.step for event in events], FIXED["step"]),
        "total_steps": pa.array([data.get("total_steps") for data in told], FIXED["total_steps"]),
    }
    metrics = {METRIC + name: pa.array([_number(data.get(name)) for data in told], pa.float64()) for name in names}
    return pa.table({**columns, **metrics})


def _number(value: float | None) -> float | None:
    """Returns the value as a float, which Arrow needs for a float64 column. The database's JSONB gives a number such as
    1e16 back as an int. None stays None.
    """
    return None if value is None else float(value)


def with_new_steps(block: pa.Table, other: pa.Table) -> pa.Table:
    """Returns the block (a table with a row for each training step) with the rows of `other` added. Leaves out rows of
    `other` for steps that the block has already."""
    new = other.filter(pc.invert(pc.is_in(other["step"], value_set=block["step"].combine_chunks())))
    return pa.concat_tables([block, new], promote_options="default").sort_by("step")


def names_of(block: pa.Table) -> list[str]:
    """Returns the names of the metrics in the block, which is a table with a row for each training step."""
    return [name.removeprefix(METRIC) for name in block.column_names if name.startswith(METRIC)]


def steps_of(block: pa.Table) -> list[dict[str, Any]]:
    """Returns a dictionary for each row of the block, which is a table with a row for each training step. The
    dictionary has the number of the step (`step`), the number of all steps of the job (`total_steps`), and the step's
    metrics."""
    renamed = block.drop_columns(["event_id", "created_at"])
    renamed = renamed.rename_columns([name.removeprefix(METRIC) for name in renamed.column_names])
    return [{name: value for name, value in row.items() if value is not None} for row in renamed.to_pylist()]


def to_bytes(block: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    encodings = {name: "DELTA_BINARY_PACKED" if name in FIXED else "BYTE_STREAM_SPLIT" for name in block.column_names}
    pq.write_table(
        block,
        sink,
        compression="zstd",
        use_dictionary=False,
        column_encoding=encodings,
        write_statistics=False,
        store_schema=False,
    )
    return bytes(sink.getvalue())


def from_bytes(data: bytes) -> pa.Table:
    return pq.read_table(pa.BufferReader(data), use_threads=False)


def values_of(block: pa.Table) -> pa.Table:
    """Returns the metrics of a block in the form that `added_up` takes, a table with the columns SUMS. A block is a
    table with a row for each training step.

    The result has a row for each value of each metric: its sum, least, greatest and last value are all this one value,
    and its count is 1.
    """
    parts = []
    for name in names_of(block):
        known = pa.table({"step": block["step"], "value": block[METRIC + name]}).drop_null()
        ones = {"metric": pa.repeat(name, len(known)), "count": pa.repeat(1, len(known))}
        same = dict.fromkeys(("sum", "min", "max", "last"), known["value"])
        parts.append(pa.table({"step": known["step"], **ones, **same}).cast(SUMS))
    return pa.concat_tables(parts) if parts else SUMS.empty_table()


def added_up(sums: pa.Table, first: int, width: int) -> pa.Table:
    """Adds up sums whose steps are in the same bucket, for each metric. Bucket n has the steps from `first` + n *
    `width`.

    `sums` is a table with the columns SUMS: for a metric and some steps, the number of values, their sum, and the
    least, greatest and last value. The result has the same columns, and one row for each bucket and metric.
    """
    buckets = pc.divide(pc.subtract(sums["step"], first), width)
    kinds = {"step": "max", "count": "sum", "sum": "sum", "min": "min", "max": "max", "last": "last"}
    groups = sums.append_column("bucket", buckets).sort_by("step").group_by(["bucket", "metric"], use_threads=False)
    found = groups.aggregate(list(kinds.items()))
    columns = {name: found[f"{name}_{kind}"] for name, kind in kinds.items()}
    return pa.table({name: found["metric"] if name == "metric" else columns[name] for name in SUMS.names}).cast(SUMS)


def sums_of(block: pa.Table) -> bytes:
    """Returns the sums of each metric over each SUM_STEPS steps of the block, as the bytes of an Arrow table with the
    columns SUMS. A block is a table with a row for each training step."""
    sums = added_up(values_of(block), 1, SUM_STEPS)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SUMS, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(sums.combine_chunks())
    return bytes(sink.getvalue())


def sums_from_bytes(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()
