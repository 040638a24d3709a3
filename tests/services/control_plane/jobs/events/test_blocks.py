"""Tests the bytes and the sums of blocks of training steps."""

from datetime import UTC, datetime
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy
import pytest

from services.control_plane.jobs.events.blocks import (
    added_up,
    block_of,
    from_bytes,
    names_of,
    number_of,
    steps_of,
    sums_from_bytes,
    sums_of,
    to_bytes,
    values_of,
    with_new_steps,
)

LOSSES = numpy.random.default_rng(0).normal(size=2000)


def event(step: int, **metrics: float) -> Any:
    data = {"step": step, "total_steps": 2000, **metrics}
    return SimpleNamespace(id=7 + step, step=step, created_at=datetime.fromtimestamp(step, UTC), data=data)


def losses(steps: range) -> list[Any]:
    return [event(step, loss=float(LOSSES[step]), **({"eval": step / 7} if step % 50 == 0 else {})) for step in steps]


def test_blocks_begin_after_each_thousandth_step() -> None:
    assert [number_of(step) for step in (1, 1000, 1001, 2**31 - 1)] == [0, 0, 1, 2147483]


def test_bytes_keep_every_value_exactly_and_what_is_missing() -> None:
    events = losses(range(1, 1001))
    block = from_bytes(to_bytes(block_of(events)))
    assert steps_of(block) == [each.data for each in events]
    assert block["event_id"].to_pylist() == list(range(8, 1008))
    assert block["created_at"].to_pylist() == list(range(1, 1001))
    assert names_of(block) == ["eval", "loss"]


def test_values_of_float32_take_half_the_space() -> None:
    exact = block_of([event(step, loss=float(LOSSES[step])) for step in range(1, 1001)])
    single = block_of([event(step, loss=float(numpy.float32(LOSSES[step]))) for step in range(1, 1001)])
    assert len(to_bytes(single)) < 0.6 * len(to_bytes(exact))


def test_a_step_that_the_block_has_keeps_its_values() -> None:
    block = block_of([event(1, loss=1.0), event(3, loss=3.0)])
    found = with_new_steps(block, block_of([event(2, other=2.0), event(3, loss=9.0)]))
    assert [step.get("loss", step.get("other")) for step in steps_of(found)] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("width", [1, 7, 100])
def test_sums_of_buckets_are_those_of_their_values(width: int) -> None:
    events = losses(range(1001, 1500))
    sums = added_up(values_of(block_of(events)), 1001, width).sort_by("step").to_pylist()
    for name in ("loss", "eval"):
        buckets: dict[int, list[float]] = {}
        for each in events:
            if name in each.data:
                buckets.setdefault((each.step - 1001) // width, []).append(each.data[name])
        found = [row for row in sums if row["metric"] == name]
        assert [row["count"] for row in found] == [len(values) for values in buckets.values()]
        assert [row["sum"] / row["count"] for row in found] == pytest.approx(list(map(fmean, buckets.values())))
        assert [row["min"] for row in found] == list(map(min, buckets.values()))
        assert [row["max"] for row in found] == list(map(max, buckets.values()))
        assert [row["last"] for row in found] == [values[-1] for values in buckets.values()]


def test_stored_sums_are_of_a_hundred_steps_each() -> None:
    block = block_of(losses(range(1001, 1451)))
    found = sums_from_bytes(sums_of(block))
    again = added_up(values_of(block), 1, 100)
    order = [("metric", "ascending"), ("step", "ascending")]
    assert found.sort_by(order).equals(again.sort_by(order))
    assert sorted(set(found["step"].to_pylist())) == [1100, 1200, 1300, 1400, 1450]


def test_a_block_without_metrics_has_no_sums() -> None:
    block = block_of([event(1)])
    assert steps_of(from_bytes(to_bytes(block))) == [{"step": 1, "total_steps": 2000}]
    assert sums_from_bytes(sums_of(block)).num_rows == 0
