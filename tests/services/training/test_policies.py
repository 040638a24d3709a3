"""Tests what a job can start from and how it can train it, as docs/use/combinations.md says.

Each combination is loaded, trained for two steps, and trained on from the result.
"""

import itertools
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_core.config import Lora, Optim, TrainConfig
from dpo_core.encoding.encode import EncodedGroup
from dpo_core.models.model import load_policy, load_tokenizer
from dpo_core.options import Dpo, Objective, RewardBradleyTerry, RewardGaussian, Simpo, Supervised
from dpo_core.policy.scorer import score_reference
from dpo_core.training.trainer import train
from services.contract import AttemptSpec, Weights
from services.training import policies
from services.training.reports.reporting import JobFailed

CPU = torch.device("cpu")
LORA, DORA = Lora(r=4), Lora(r=4, use_dora=True)
STARTS: dict[str, tuple[Weights, Objective] | None] = {
    "base": None,
    "all weights": (Weights(), Dpo()),
    "LoRA": (Weights(adapter=LORA), Dpo()),
    "DoRA": (Weights(adapter=DORA), Dpo()),
    "LoRA on NF4": (Weights(adapter=LORA, quantization="nf4"), Dpo()),
    "reward model": (Weights(), RewardBradleyTerry()),
    "reward model's LoRA": (Weights(adapter=LORA), RewardBradleyTerry()),
}
Start = Callable[[str], str]
Run = Callable[..., tuple[str, float]]


def groups_for(objective: Objective) -> list[EncodedGroup]:
    numbers = random.Random(0)

    def ids(count: int) -> list[int]:
        return [numbers.randrange(3, 90) for _ in range(count)]

    count = 1 if objective.traits.learns_from[0] == "demonstrations" else 2
    return [EncodedGroup(ids(5), tuple(ids(4 + j) for j in range(count)), None, line) for line in range(1, 9)]


@pytest.fixture(scope="module")
def run(make_spec_in: Callable[..., AttemptSpec], model_source: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Returns a function that trains two steps as a worker does, and returns the resulting folder and the first
    loss."""

    def run(source: str, weights: Weights, objective: Objective, *, reference: str | None = None) -> tuple[str, float]:
        folder = tmp_path_factory.mktemp("run")
        config = TrainConfig(objective=objective, batch_size=4, max_length=64, optim=Optim(learning_rate=1e-2))
        spec = make_spec_in(folder, config=config, weights=weights, model_source=source, wire=2)
        groups = groups_for(objective)
        if objective.traits.needs_reference:
            scorer = policies.load_reference(reference or source, weights, CPU)
            groups = score_reference(scorer, groups, max_tokens_per_pack=512)
        steps = list(
            train(
                replace(config, checkpoint_steps=2, n_epochs=1).resolved(8),
                policies.load_policy(spec, CPU),
                load_tokenizer(model_source),
                [groups[:4], groups[4:]],
                total_steps=2,
                checkpoint_dir=folder / "checkpoints",
            )
        )
        assert all(math.isfinite(step.metrics["loss"]) and step.metrics["grad_norm"] > 0 for step in steps)
        return str(folder / "checkpoints" / "step-000002" / "model"), steps[0].metrics["loss"]

    return run


@pytest.fixture(scope="module")
def start(run: Run, model_source: str) -> Start:
    """Returns a function that returns the source of a model to start from, by name. It is made at its first use."""
    made: dict[str, str] = {}

    def source(name: str) -> str:
        how = STARTS[name]
        if name not in made:
            made[name] = run(model_source, *how)[0] if how else model_source
        return made[name]

    return source


def accepted() -> list[Any]:
    """Returns each model to start from with each way to train it, if the service accepts both together."""
    found = []
    ways = itertools.product(STARTS, (LORA, DORA, None), ("float32", "bfloat16"), (None, "nf4"))
    objectives = (Supervised(), Dpo(), Simpo(), RewardBradleyTerry(), RewardGaussian())
    for (name, adapter, precision, quantization), objective in itertools.product(ways, objectives):
        before = STARTS[name]
        own = before[0].adapter if before else None
        of_rewards = before is not None and before[1].traits.num_outputs
        on_nf4 = before is not None and before[0].quantization is not None
        if (
            (own and adapter not in (None, own))
            or (quantization and adapter is None)
            or (on_nf4 and adapter and not quantization)
            or (of_rewards and objective.traits.num_outputs != of_rewards)
            or (own and adapter is None and not of_rewards and objective.traits.num_outputs)
        ):
            continue
        words = "all weights" if adapter is None else "DoRA" if adapter.use_dora else "LoRA"
        weights = Weights(adapter=adapter, precision=precision, quantization=quantization)
        label = f"{name}, {words}, {precision}, {quantization or 'whole'}, {objective.type}"
        found.append(pytest.param(name, weights, objective, id=label))
    return found


@pytest.mark.long
@pytest.mark.parametrize(("name", "weights", "objective"), accepted())
def test_what_the_service_accepts_is_trained(
    run: Run, start: Start, name: str, weights: Weights, objective: Objective
) -> None:
    _, loss = run(start(name), weights, objective)
    if objective.type == "dpo":
        rounded = 1e-5 if weights.precision == "float32" else 2e-2
        assert loss == pytest.approx(math.log(2), abs=rounded)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [RewardBradleyTerry(), RewardGaussian()], ids=lambda objective: objective.type)
def test_a_reward_model_goes_on_with_a_policys_adapter_and_a_new_head(
    run: Run, start: Start, objective: Objective
) -> None:
    begun = start("LoRA")
    left, _ = run(begun, Weights(adapter=LORA), objective)
    before, after = (load_file(Path(folder) / "adapter_model.safetensors") for folder in (begun, left))
    (head,) = after.keys() - before.keys()
    assert len(after[head]) == objective.traits.num_outputs
    assert all((after[name] - before[name]).abs().max() < 0.05 for name in before)  # two steps away
    run(left, Weights(adapter=LORA), objective)


@pytest.mark.slow
def test_an_adapter_on_a_rounded_base_is_its_own_reference_when_it_is_merged(run: Run, start: Start) -> None:
    _, loss = run(start("LoRA on NF4"), Weights(), Dpo())
    assert loss == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.slow
def test_the_reference_of_another_job_has_the_base_that_its_adapter_was_trained_on(
    start: Start, model_source: str
) -> None:
    adapter = start("LoRA on NF4")
    groups = groups_for(Dpo())
    named = score_reference(policies.load_reference(adapter, Weights(), CPU), groups, max_tokens_per_pack=512)
    rounded = Weights(adapter=LORA, quantization="nf4")
    own = score_reference(policies.load_reference(adapter, rounded, CPU), groups, max_tokens_per_pack=512)
    whole = score_reference(policies.load_reference(model_source, Weights(), CPU), groups, max_tokens_per_pack=512)
    for a, b, c in zip(named, own, whole, strict=True):
        assert a.ref_logps == pytest.approx(b.ref_logps, abs=1e-4)
        assert a.ref_logps != pytest.approx(c.ref_logps, abs=1e-2)


def test_modules_that_the_model_lacks_fail_the_job_by_their_field(
    make_spec_in: Callable[..., AttemptSpec], tmp_path: Path
) -> None:
    weights = Weights(adapter=Lora(target_modules=("nowhere",)))
    with pytest.raises(JobFailed) as failed:
        policies.load_policy(make_spec_in(tmp_path, weights=weights, wire=2), CPU)
    report = failed.value.report
    assert (report.code, report.param) == ("invalid_model", "x_raydpo.adapter.target_modules")
    assert "nowhere" in report.message


@pytest.fixture
def adapter(model_source: str, tmp_path: Path) -> Path:
    load_policy(model_source, adapter=Lora(r=2)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def without_a_norm(source: str, folder: Path) -> str:
    folder.mkdir()
    for file in Path(source).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_a_model_is_fetched_with_the_base_that_its_adapter_names(adapter: Path, model_source: str) -> None:
    assert policies.fetch(str(adapter)) == (adapter, Path(model_source))
    assert policies.fetch(model_source) == (Path(model_source), None)
    assert policies.base_of(str(adapter)) == policies.base_of(model_source) == model_source


def test_a_reference_is_frozen_whole_or_with_its_adapter(adapter: Path, model_source: str) -> None:
    for source in (model_source, str(adapter)):
        reference = policies.load_reference(source, Weights(), CPU)
        assert not any(weight.requires_grad for weight in reference.parameters())


def test_a_reference_that_lacks_weights_fails_the_job_by_name(model_source: str, tmp_path: Path) -> None:
    damaged = without_a_norm(model_source, tmp_path / "damaged")
    with pytest.raises(JobFailed) as failure:
        policies.load_reference(damaged, Weights(), CPU)
    failed = failure.value.report
    assert failed.message.startswith(
        f"The reference model cannot be used: {damaged} lacks 1 weights, such as model.norm"
    )
    assert (failed.code, failed.param) == ("invalid_model", "model")


def test_a_reference_whose_adapter_does_not_fit_its_base_fails_the_job(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: weight[..., :-1].contiguous() for name, weight in weights.items()}, adapter / "adapter_model.safetensors"
    )
    with pytest.raises(JobFailed, match=r"model cannot be used: The adapter in .* whose shapes do not fit the model"):
        policies.load_reference(str(adapter), Weights(), CPU)


@pytest.mark.parametrize("weights", [Weights(), Weights(adapter=Lora(r=2))])
def test_a_policy_that_lacks_weights_fails_the_job(
    weights: Weights, make_spec_in: Callable[..., AttemptSpec], model_source: str, tmp_path: Path
) -> None:
    damaged = without_a_norm(model_source, tmp_path / "damaged")
    with pytest.raises(JobFailed, match=r"The model cannot be trained: .*damaged lacks 1 weights"):
        policies.load_policy(make_spec_in(tmp_path, model_source=damaged, weights=weights), CPU)


def test_a_policy_merged_from_an_adapter_of_another_base_fails_the_job(
    adapter: Path, make_spec_in: Callable[..., AttemptSpec], tmp_path: Path
) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": ["q_proj"]}))
    with pytest.raises(JobFailed, match=r"The model cannot be trained: The adapter in .* does not fit the base"):
        policies.load_policy(make_spec_in(tmp_path, model_source=str(adapter), weights=Weights()), CPU)
