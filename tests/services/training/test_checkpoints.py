"""Tests whole attempts (runs of a job) that stop early: which checkpoints stay, and which of them becomes the
policy."""

from collections.abc import Callable
from typing import Any

import pytest

from dpo_core.checkpoint_selection import best, evaluations
from dpo_core.config import EarlyStop, Optim, TrainConfig
from services import storage
from services.contract import AttemptSpec, CheckpointSaved, Message, Started, StepMetrics
from services.training.run.stored_checkpoints import checkpoint_uri, complete, manifest_of
from tests.services.training.attempt import Driver, figures, only, train_workers

pytestmark = pytest.mark.ray

PATIENCE, EVERY, METRIC = 10, 4, "eval/rewards/accuracies"  # which soon is 1, and then brings no gain any more
CONFIG = TrainConfig(
    batch_size=4,
    n_epochs=50,
    checkpoint_steps=EVERY,
    best_metric=METRIC,
    early_stop=EarlyStop(patience=PATIENCE),
    optim=Optim(learning_rate=1e-3),
)
GIVEN = {"policy": "best", "validation_share": 0.25, "reference_source": "trainer", "wire": 2}


def test_an_attempt_stops_early_and_leaves_the_best_checkpoint_as_the_policy_though_a_worker_is_killed(
    make_spec: Callable[..., AttemptSpec],
    start: Callable[[AttemptSpec], Driver],
    ray_environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
    make_spec_in: Callable[..., AttemptSpec],
    control_plane: Any,
) -> None:
    given: dict[str, Any] = {"config": CONFIG, "num_workers": 2, "events_url": control_plane.url, **GIVEN}
    straight = start(make_spec(**given))
    assert straight.wait() == 0, straight.log.read_text()[-5000:]
    reports, run_uri = straight.reports(), straight.spec.run_uri
    saved = [(report.step, report.metrics) for report in only(CheckpointSaved, reports)]
    found = evaluations(saved, METRIC)
    top, last = best(found, METRIC), only(StepMetrics, reports)[-1]
    assert top is not None
    assert [each.step for each in found] == list(range(EVERY, last.step + 1, EVERY))
    assert top.step + PATIENCE * EVERY == last.step < last.total_steps
    told = [report.message for report in only(Message, reports)]
    assert f"Stopped early after step {last.step}: {METRIC} has not improved at all in {PATIENCE} evaluations." in told
    assert any(
        message.startswith(f"The job's policy is the checkpoint of step {top.step}, whose {METRIC} ")
        for message in told
    )
    model = storage.join(checkpoint_uri(run_uri, top.step), "model", "model.safetensors")
    exported = storage.join(run_uri, "export", "model.safetensors")
    assert storage.read_bytes(exported) == storage.read_bytes(model)
    having = [step for step, uri in complete(run_uri) if manifest_of(uri).has_optimizer]
    assert having == [last.step, last.step - EVERY]

    again = make_spec_in(tmp_path_factory.mktemp("again"), **given)
    killed = start(again)
    killed.reported(CheckpointSaved)
    train_workers(ray_environment)[1].kill()
    assert killed.wait() == 0, killed.log.read_text()[-5000:]
    assert len(only(Started, killed.reports())) == 2
    assert figures(killed.reports()) == figures(reports)
    assert storage.read_bytes(storage.join(again.run_uri, "export", "model.safetensors")) == storage.read_bytes(
        exported
    )
