"""Tests the TensorBoard sink: TensorBoard itself reads the event files."""

from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from services import storage
from services.contract import AttemptSpec, Message
from services.training.reports.integrations.following import Follower
from services.training.reports.integrations.tensorboard import TensorboardSink
from tests.services.training.spool import STARTED_AT, Spool


def follow(spec: AttemptSpec, status: Any) -> list[Any]:
    told: list[Any] = []
    Follower("TensorBoard", TensorboardSink, spec, told.append).close(status, 30)
    return told


def read(spec: AttemptSpec) -> EventAccumulator:
    accumulator = EventAccumulator(str(storage.fetch(storage.join(spec.run_uri, "tensorboard"))))
    accumulator.Reload()
    return accumulator


def scalars(accumulator: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def text(accumulator: EventAccumulator, tag: str) -> list[str]:
    return [event.tensor_proto.string_val[0].decode() for event in accumulator.Tensors(f"{tag}/text_summary")]


def test_a_resumed_run_is_one_run_with_each_step_once(spec: AttemptSpec, spool: Spool) -> None:
    first = spec.model_copy(update={"attempt": 1})
    spool.add_steps(1, 5)
    assert follow(first, None) == [
        Message(message="TensorBoard: the event files are written to runs/ftjob-1/tensorboard in the service's storage")
    ]
    spool.add_steps(4, 9, attempt=2)
    follow(spec, "succeeded")
    found = read(spec)
    assert scalars(found, "train/loss") == [(n, pytest.approx(1 / n)) for n in range(1, 10)]
    assert scalars(found, "eval/loss") == [(n, pytest.approx(2 / n)) for n in (3, 6, 9)]
    assert found.Scalars("train/loss")[0].wall_time == STARTED_AT + 1
    assert text(found, "status") == ["succeeded"]
    assert '"fine_tuned_model": "ft:tiny:raydpo::12345678"' in text(found, "config")[-1]
    assert '"batch_size": 4' in text(found, "config")[-1]
