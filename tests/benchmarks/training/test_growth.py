"""Tests that the benchmark of growing costs measures what it compares."""

import pytest

from benchmarks.training.growth import Case, measure


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_workers_share_the_operations_and_need_the_memory_of_a_plan():
    alone, together = (measure(Case(workers=number), repeats=1) for number in (1, 2))
    assert together["operations"] == alone["operations"] > 0
    for found in (alone, together):
        assert found["bytes"] == pytest.approx(found["planned_bytes"], rel=0.1)
        assert found["cpu_seconds"] > 0
    assert together["bytes"] < alone["bytes"]
