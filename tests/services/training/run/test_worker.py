import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from dpo_core.checkpoint_selection import Evaluation
from dpo_core.config import EarlyStop, Optim, TrainConfig
from dpo_core.models.model import load_policy, load_tokenizer
from dpo_core.options import Supervised
from dpo_core.policy.scorer import score_reference
from dpo_core.training.checkpoint import Manifest
from dpo_core.training.checkpoint_writer import Writer
from dpo_core.training.optim import make_optimizer
from dpo_core.training.trainer import StepResult, train
from dpo_core.training.weights import Weights
from services import storage
from services.contract import AttemptSpec, Message, Report
from services.training.data.dataset import read_numbered
from services.training.data.encoding import encode, encode_piece, recipe_of
from services.training.data.row_order import global_batches, num_steps
from services.training.run.worker import (
    checkpoint_uri,
    explain_end,
    failure_of,
    held_out,
    newest_checkpoint,
    starts_at_ln2,
    step_of_policy,
)
from tests.dpo_core.conftest import build_groups, build_mixture, build_tokenizer

MakeSpec = Callable[..., AttemptSpec]
LN2 = math.log(2)


def result(step: int = 1, **metrics: float) -> StepResult:
    return StepResult(step, 10, {"loss": LN2, "lr": 1e-6} | metrics, 100, None)


def test_dpo_that_does_not_begin_at_ln_2_is_stopped_with_both_figures(make_spec: MakeSpec) -> None:
    spec = make_spec(reference="tiny-reference")
    assert failure_of(result(loss=LN2 + 0.9e-3), spec) is None
    failed = failure_of(result(loss=LN2 + 1.1e-3), spec)
    assert failed is not None
    assert failed.code == "reference_mismatch"
    for part in ("0.694247", "0.693147", "0.001", "tiny-reference"):
        assert part in failed.message


def test_dpo_of_a_mixture_begins_at_ln_2_however_much_the_balance_of_its_experts_counts(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    build_mixture(router_aux_loss_coef=1.0).save_pretrained(tmp_path / "model")
    policy, config = load_policy(tmp_path / "model"), TrainConfig(batch_size=4, checkpoint_steps=9).resolved(4)
    groups = score_reference(policy, build_groups(4, 2), max_tokens_per_pack=999)
    first = next(train(config, policy, build_tokenizer(), [groups], total_steps=1, checkpoint_dir=tmp_path))
    assert first.metrics["aux_loss"] > 1
    assert failure_of(first, make_spec(config=config)) is None
    assert starts_at_ln2(first, make_spec(config=config))


def test_later_steps_and_other_objectives_begin_anywhere(make_spec: MakeSpec) -> None:
    assert failure_of(result(step=2, loss=0.1), make_spec()) is None
    assert failure_of(result(loss=5.0), make_spec(config=TrainConfig(objective=Supervised()))) is None


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_figures_that_are_no_numbers_stop_the_job(make_spec: MakeSpec, key: str, value: float) -> None:
    failed = failure_of(result(step=7, **{key: value}), make_spec())
    assert failed is not None
    assert failed.code == "training_diverged"
    assert failed.message == (
        f"The metric {key} is {value} at step 7, where the learning rate is 1e-06; lower the learning rate."
    )
    first = failure_of(result(step=1, **{key: value}), make_spec())
    assert first is not None
    assert first.param is None
    assert first.message == f"The metric {key} is {value} at step 1, before any training; check the model and the data."


@pytest.fixture
def checkpoints(make_spec: MakeSpec, model_source: str, tmp_path: Path) -> list[str]:
    """Returns the URIs of three checkpoints, of the steps 10, 20 and 30."""
    policy, spec = load_policy(model_source), make_spec()
    weights = Weights(policy)
    optimizer = make_optimizer(weights.stepped.values(), spec.config.resolved(24).optim)
    weights.collect_gradients(max_norm=1.0)
    optimizer.step()

    def publish(step: int, folder: Path) -> None:
        storage.publish(folder, checkpoint_uri(spec, step))

    with Writer(tmp_path / "scratch", policy, load_tokenizer(model_source), weights, publish) as writer:
        for step in (10, 20, 30):
            writer.save(Manifest(step, 30, step, step, {}, {}, asdict(spec.config), {}), optimizer, {})
    return [checkpoint_uri(spec, step) for step in (10, 20, 30)]


def test_the_newest_complete_checkpoint_is_resumed(checkpoints: list[str], make_spec: MakeSpec, tmp_path: Path) -> None:
    reports: list[Report] = []
    assert newest_checkpoint(make_spec().run_uri, tmp_path, reports.append) == checkpoints[2]
    storage.delete(storage.join(checkpoints[2], storage.MANIFEST))  # died while publishing
    assert newest_checkpoint(make_spec().run_uri, tmp_path, reports.append) == checkpoints[1]
    assert reports == []


def test_the_newest_checkpoint_is_that_of_the_highest_step_however_many_digits_it_has(
    checkpoints: list[str], make_spec: MakeSpec, tmp_path: Path
) -> None:
    spec = make_spec()
    for place, step in ((1, 999_999), (0, 1_000_000)):
        storage.publish(storage.fetch(checkpoints[place]), checkpoint_uri(spec, step))
    assert newest_checkpoint(spec.run_uri, tmp_path, lambda report: None) == checkpoint_uri(spec, 1_000_000)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    checkpoints: list[str], make_spec: MakeSpec, tmp_path: Path
) -> None:
    weights = storage.fetch(storage.join(checkpoints[2], "model", "model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    storage.delete(storage.join(checkpoints[1], "optimizer-00001-of-00001.safetensors"))
    reports: list[Message] = []
    assert newest_checkpoint(make_spec().run_uri, tmp_path, reports.append) == checkpoints[0]
    assert [report.level for report in reports] == ["warn", "warn"]
    assert "step-000030/model/model.safetensors" in reports[0].message
    assert "step-000020/optimizer-00001-of-00001.safetensors is missing" in reports[1].message


def test_the_policy_is_the_last_checkpoint_or_the_best_and_an_event_says_why(make_spec: MakeSpec) -> None:
    found = [Evaluation(10, 0.5), Evaluation(20, 0.25), Evaluation(30, 0.4)]
    last, top = make_spec(), make_spec(policy="best")
    assert (step_of_policy(30, found, last), step_of_policy(30, found, top)) == (30, 20)
    assert explain_end(30, 30, found, last) == []
    (why,) = explain_end(30, 30, found, top)
    assert why.message == (
        "The job's policy is the checkpoint of step 20, whose eval/loss 0.25 is the best of 3 evaluations."
    )
    (warning,) = explain_end(30, 30, [], top)
    assert (step_of_policy(30, [], top), warning.level) == (30, "warn")
    assert "No checkpoint has a value of eval/loss" in warning.message


@pytest.mark.parametrize(("min_gain", "words"), [(0.0, "at all"), (0.01, "by 0.01")])
def test_an_event_says_why_a_run_stopped_early(make_spec: MakeSpec, min_gain: float, words: str) -> None:
    spec = make_spec(config=TrainConfig(early_stop=EarlyStop(patience=2, min_gain=min_gain)))
    found = [Evaluation(10, 0.5), Evaluation(20, 0.5), Evaluation(30, 0.5)]
    (why,) = explain_end(30, 90, found, spec)
    assert why.message == f"Stopped early after step 30: eval/loss has not improved {words} in 2 evaluations."
    assert explain_end(90, 90, found, spec) == []


def test_a_fresh_run_has_no_checkpoint(make_spec: MakeSpec, tmp_path: Path) -> None:
    assert newest_checkpoint(make_spec().run_uri, tmp_path, lambda report: None) is None


def test_demonstrations_are_trained_as_they_were_encoded_and_evaluated_alike(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    messages = [{"role": "user", "content": "What is 1 and 1?"}, {"role": "assistant", "content": "It is 2."}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}))
    config = TrainConfig(objective=Supervised(), n_epochs=4, optim=Optim(learning_rate=1e-3)).resolved(1)
    spec, uri = make_spec(config=config, training_uri=str(tmp_path / "chat.jsonl")), str(tmp_path / "encoded")
    recipe = recipe_of(spec)
    made = encode(spec, uri, lambda pieces: [encode_piece(recipe, uri, piece) for piece in pieces], lambda report: None)
    data = made.training
    results = train(
        config,
        load_policy(spec.model_source),
        load_tokenizer(spec.model_source),
        lambda after_step: global_batches(data, config, after_step=after_step),
        total_steps=num_steps(data.num_groups, config),
        checkpoint_dir=tmp_path,
        validation=held_out(data, read_numbered),
    )
    metrics = [result.metrics for result in results]
    losses = [step["loss"] for step in metrics]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    # The held-out groups being those of every step, a policy makes of them what the next step begins with.
    assert [step["eval/loss"] for step in metrics[:-1]] == pytest.approx(losses[1:])
    assert metrics[-1]["eval/loss"] < losses[-1]


def test_without_held_out_groups_nothing_is_evaluated() -> None:
    assert held_out(None, read_numbered) is None
