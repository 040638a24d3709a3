"""Tests how long workers wait for GPUs that other programs still hold."""

import os

import pytest
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR as WAIT

from services.training.run.ray_trainer import Trainer


def test_workers_wait_for_half_an_hour_for_their_gpus_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(WAIT, "7")
    Trainer(print)
    assert os.environ[WAIT] == "7"
    monkeypatch.delenv(WAIT)
    Trainer(print)
    assert os.environ[WAIT] == "1800"
