"""Converts the metrics of a job's training steps to compact bytes, and adds them up over ranges of steps.

A block holds up to BLOCK_STEPS steps of a job. It is a table of Arrow with a row for each step, and is stored as
Parquet, whose BYTE_STREAM_SPLIT keeps float64 exactly and makes float32 in float64 small. Beside it the database stores
the block's sums: how many values each metric has in each SUM_STEPS steps, their sum, and the least, greatest and last
of them. A chart of many steps needs the sums only.
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
    """Returns the number of the block that holds the training step `step`."""
    return (step - 1) // BLOCK_STEPS


def block_of(events: Sequence[Any]) -> pa.Table:
    """Returns the block of the metrics events `events`, which are rows of the table `events`, sorted by step."""
    told = [event.data or {} for event in events]
    names = sorted({name for data in told for name in data} - FIXED.keys())
    columns: dict[str, pa.Array] = {
        "event_id": pa.array([event.id for event in events], FIXED["event_id"]),
        "created_at": pa.array([int(event.created_at.timestamp()) for event in events], FIXED["created_at"]),
        "step": pa.array([event.step for event in events], FIXED["step"]),
        "total_steps": pa.array([data.get("total_steps") for data in told], FIXED["total_steps"]),
    }
    metrics = {METRIC + name: pa.array([data.get(name) for data in told], pa.float64()) for name in names}
    return pa.table({**columns, **metrics})


def with_new_steps(block: pa.Table, other: pa.Table) -> pa.Table:
    """Returns the block with those steps of the block `other` that it does not have yet."""
    new = other.filter(pc.invert(pc.is_in(other["step"], value_set=block["step"].combine_chunks())))
    return pa.concat_tables([block, new], promote_options="default").sort_by("step")


def metrics_of(block: pa.Table) -> list[str]:
    """Returns the names of the block's metrics."""
    return [name.removeprefix(METRIC) for name in block.column_names if name.startswith(METRIC)]


def steps_of(block: pa.Table) -> list[dict[str, Any]]:
    """Returns a dictionary for each step of the block: the step, the number of all steps, and the step's metrics."""
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
    """Returns the block's values as sums (see SUMS) of one value each."""
    parts = []
    for name in metrics_of(block):
        known = pa.table({"step": block["step"], "value": block[METRIC + name]}).drop_null()
        ones = {"metric": pa.repeat(name, len(known)), "count": pa.repeat(1, len(known))}
        same = dict.fromkeys(("sum", "min", "max", "last"), known["value"])
        parts.append(pa.table({"step": known["step"], **ones, **same}).cast(SUMS))
    return pa.concat_tables(parts) if parts else SUMS.empty_table()


def added_up(sums: pa.Table, first: int, width: int) -> pa.Table:
    """Adds up sums (see SUMS) whose steps are in the same bucket. Bucket n has the steps from `first` + n * `width`."""
    buckets = pc.divide(pc.subtract(sums["step"], first), width)
    kinds = {"step": "max", "count": "sum", "sum": "sum", "min": "min", "max": "max", "last": "last"}
    groups = sums.append_column("bucket", buckets).sort_by("step").group_by(["bucket", "metric"], use_threads=False)
    found = groups.aggregate(list(kinds.items()))
    columns = {name: found[f"{name}_{kind}"] for name, kind in kinds.items()}
    return pa.table({name: found["metric"] if name == "metric" else columns[name] for name in SUMS.names}).cast(SUMS)


def sums_of(block: pa.Table) -> bytes:
    """Returns the sums of each SUM_STEPS steps of the block, as bytes."""
    sums = added_up(values_of(block), 1, SUM_STEPS)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SUMS, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(sums.combine_chunks())
    return bytes(sink.getvalue())


def sums_from_bytes(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()
