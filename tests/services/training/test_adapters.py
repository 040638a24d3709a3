"""Tests whole attempts (runs of a job) that train LoRA adapters.

They test what an attempt leaves, how later jobs go on from it, and which reference a job uses.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from dpo_core.config import Lora, Optim, TrainConfig
from dpo_core.models.model import load_merged, load_policy
from dpo_core.policy.adapter_effect import Effect, Row
from services import storage
from services.contract import AttemptSpec, CheckpointSaved, Failed, Message, Report, Started, Succeeded, Weights
from services.training.driver import export
from services.training.reports.reporting import JobFailed
from tests.services.training.attempt import Driver, figures, only, train_workers

pytestmark = pytest.mark.ray

CONFIG = TrainConfig(batch_size=4, n_epochs=20, checkpoint_steps=40, optim=Optim(learning_rate=1e-2))
ADAPTER = Weights(adapter=Lora(r=4, alpha=8))
GIVEN = {"weights": ADAPTER, "reference_source": "trainer", "wire": 2}
MakeSpec = Callable[..., AttemptSpec]


@pytest.fixture
def make_spec(tmp_path: Path, make_spec_in: MakeSpec, control_plane: Any) -> MakeSpec:
    """Returns a function that makes the settings of an attempt that reaches a control plane.

    Without one, a driver would wait for it before it ends.
    """
    return partial(make_spec_in, tmp_path, events_url=control_plane.url)


def done(driver: Driver) -> Driver:
    assert driver.wait() == 0, (driver.reports()[-1], driver.log.read_text()[-5000:])
    return driver


@pytest.fixture(scope="module")
def adapted(
    make_spec_in: MakeSpec,
    tmp_path_factory: pytest.TempPathFactory,
    ray_environment: dict[str, str],
    lasting_control_plane: Any,
) -> Driver:
    """Returns a finished attempt of two workers that trained an adapter."""
    folder = tmp_path_factory.mktemp("adapted")
    spec = make_spec_in(folder, config=CONFIG, num_workers=2, events_url=lasting_control_plane.url, **GIVEN)
    return done(Driver(spec, ray_environment, lasting_control_plane.token))


def exported(driver: Driver) -> Path:
    return storage.fetch(f"{driver.spec.run_uri}/export")


def test_an_adapter_is_trained_and_names_its_base(adapted: Driver, model_source: str) -> None:
    reports = adapted.reports()
    assert figures(reports)[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert figures(reports)[120]["loss"] < 0.3
    folder = exported(adapted)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (model_source, 4, 8)
    assert not (folder / "model.safetensors").exists()
    ids = torch.arange(3, 40)[None]
    plain, merged = AutoPeftModelForCausalLM.from_pretrained(folder), load_merged(folder)
    torch.testing.assert_close(merged(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(model_source)(input_ids=ids).logits
    assert (base - plain(input_ids=ids).logits).abs().max() > 0.1


def test_an_adapters_worker_that_is_killed_costs_no_bit(
    adapted: Driver,
    make_spec: MakeSpec,
    start: Callable[[AttemptSpec], Driver],
    ray_environment: dict[str, str],
) -> None:
    driver = start(make_spec(config=CONFIG, num_workers=2, **GIVEN))
    driver.reported(CheckpointSaved)
    train_workers(ray_environment)[1].kill()
    done(driver)
    assert len(only(Started, driver.reports())) == 2
    assert figures(driver.reports()) == figures(adapted.reports())
    ours, theirs = (load_policy(adapted.spec.model_source, adapter=exported(each)) for each in (driver, adapted))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_workers_that_split_the_base_read_their_parts_of_it(
    adapted: Driver, make_spec: MakeSpec, start: Callable[[AttemptSpec], Driver]
) -> None:
    driver = done(start(make_spec(config=replace(CONFIG, sharding="full"), num_workers=2, **GIVEN)))
    assert "loaded whole" not in driver.log.read_text()
    whole, parts = figures(adapted.reports()), figures(driver.reports())
    assert parts.keys() == whole.keys()
    for step in (1, 2, 10):
        assert parts[step]["loss"] == pytest.approx(whole[step]["loss"], rel=1e-3)
        assert parts[step]["grad_norm"] == pytest.approx(whole[step]["grad_norm"], rel=1e-3)
    config = json.loads((exported(driver) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == driver.spec.model_source


def test_a_job_goes_on_with_an_adapter_and_its_start_is_the_reference(
    adapted: Driver,
    make_spec: MakeSpec,
    start: Callable[[AttemptSpec], Driver],
    model_source: str,
) -> None:
    driver = done(start(make_spec(model_source=str(exported(adapted)), config=CONFIG, **GIVEN)))
    first, last = (figures(driver.reports())[step] for step in (1, 120))
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/accuracies"] == 0
    assert last["loss"] < 0.69
    config = json.loads((exported(driver) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == model_source


def test_an_adapter_is_merged_where_all_weights_are_trained(
    adapted: Driver,
    make_spec: MakeSpec,
    start: Callable[[AttemptSpec], Driver],
) -> None:
    config = TrainConfig(batch_size=24, n_epochs=1, optim=Optim(learning_rate=1e-4))
    driver = done(
        start(make_spec(model_source=str(exported(adapted)), config=config, **GIVEN | {"weights": Weights()}))
    )
    assert figures(driver.reports())[1]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert (exported(driver) / "model.safetensors").is_file()


def test_another_model_may_be_the_reference(
    adapted: Driver,
    make_spec: MakeSpec,
    start: Callable[[AttemptSpec], Driver],
    model_source: str,
) -> None:
    """The first loss compares the start of training with this reference, as the next step of the earlier job would
    have."""
    given = GIVEN | {"model_source": str(exported(adapted)), "reference_model_source": model_source}
    driver = done(start(make_spec(config=CONFIG, **given)))
    metrics = figures(driver.reports())
    assert metrics[1]["loss"] < 0.3
    assert metrics[1]["rewards/accuracies"] > 0.9
    assert not any("ln 2" in report.message for report in only(Message, driver.reports()))


def test_a_reference_with_other_tokens_is_refused(
    make_spec: MakeSpec, start: Callable[[AttemptSpec], Driver], byte_level_model: str
) -> None:
    driver = start(make_spec(config=CONFIG, reference_model_source=byte_level_model, **GIVEN))
    assert driver.wait() == 1
    failed = driver.reports()[-1]
    assert isinstance(failed, Failed)
    assert (failed.code, failed.param) == ("reference_mismatch", "x_raydpo.reference.model")
    assert "another tokenizer" in failed.message


def test_a_base_in_nf4_is_trained_in_bfloat16_with_a_warning_where_that_is_slow(
    make_spec: MakeSpec, start: Callable[[AttemptSpec], Driver]
) -> None:
    config = TrainConfig(batch_size=8, n_epochs=2, optim=Optim(learning_rate=1e-2))
    weights = Weights(adapter=ADAPTER.adapter, precision="bfloat16", quantization="nf4")
    driver = done(start(make_spec(config=config, **GIVEN | {"weights": weights})))
    metrics = figures(driver.reports())
    assert metrics[1]["loss"] == pytest.approx(math.log(2), abs=2e-3)
    assert metrics[6]["loss"] < metrics[1]["loss"]
    warned = any("has no AMX" in report.message for report in only(Message, driver.reports()))
    assert warned != torch.cpu._is_amx_tile_supported()


def test_an_adapter_that_changes_nothing_is_told_and_one_that_is_broken_is_not_exported(
    make_spec: MakeSpec, model_source: str, tmp_path: Path
) -> None:
    spec, folder, told = make_spec(**GIVEN), tmp_path / "policy", list[Report]()
    policy = load_policy(model_source, adapter=Lora(r=4))
    for value, said in ((0.0, ["The adapter has learned nothing"]), (1e-3, [])):
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(weight, value)
        policy.save_pretrained(folder)
        trained = Succeeded(model_uri=folder.as_uri(), trained_tokens=1)
        assert export(spec, trained, told.append).model_uri == f"{spec.run_uri}/export"
        assert [(report.level, report.message.partition(":")[0]) for report in only(Message, told)] == [
            ("warn", sentence) for sentence in said
        ]
        told.clear()
    (folder / "effect.json").write_bytes(Effect([Row([5], [6], policy=-1.5, base=-1.5)]).to_json())
    export(spec, trained, told.append)
    assert [report.message.partition(":")[0] for report in only(Message, told)] == ["The adapter has learned nothing"]
    next(weight for name, weight in policy.named_parameters() if "lora_B" in name).data[0, 0] = torch.nan
    policy.save_pretrained(folder)
    with pytest.raises(JobFailed, match="has NaN or infinite values, such as in"):
        export(spec, trained, told.append)
