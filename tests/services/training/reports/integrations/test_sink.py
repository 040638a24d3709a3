"""Tests that every sink has the interface that followers call."""

import inspect
from typing import get_type_hints

import pytest

from services.training.reports.integrations.mlflow import MlflowSink
from services.training.reports.integrations.sink import Sink
from services.training.reports.integrations.tensorboard import TensorboardSink
from services.training.reports.integrations.wandb import WandbSink


@pytest.mark.parametrize("kind", [WandbSink, MlflowSink, TensorboardSink])
@pytest.mark.parametrize("name", ["begin", "write", "close"])
def test_a_sink_takes_the_calls_of_the_interface(kind: type, name: str) -> None:
    call, wanted = getattr(kind, name), getattr(Sink, name)
    assert list(inspect.signature(call).parameters) == list(inspect.signature(wanted).parameters)
    assert get_type_hints(call) == get_type_hints(wanted)
