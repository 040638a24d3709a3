"""Tests training against TRL's trainers on the same rows.

The policy differs from the reference. If they were equal, any code would return ln 2, and the test would prove nothing.
"""

import importlib
import json
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

from dpo_core import options as o
from dpo_core.config import Optim, TrainConfig
from dpo_core.data.feedback import read_groups
from dpo_core.data.groups import Group
from dpo_core.encoding.encode import EncodedGroup, encode_group
from dpo_core.models.model import load_policy, load_reward_model
from dpo_core.models.quantization import round_to_nf4
from dpo_core.training.trainer import StepResult, train

STEPS, BATCH_SIZE, BETA, RATE = 20, 4, 0.1, 3e-4

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sleeps", "in", "warm", "sun"]
ROWS = [
    {
        "prompt": [{"role": "user", "content": " ".join(WORDS[i % 5 : 3 + i % 9])}],
        "chosen": [{"role": "assistant", "content": " ".join(WORDS[i % 7 : 4 + i % 11])}],
        "rejected": [{"role": "assistant", "content": " ".join(WORDS[-3 - i % 10 :])}],
    }
    for i in range(2 * BATCH_SIZE)
]
THEIR_KEYS = {"lr": "learning_rate"}


def train_with_trl(
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer,
    folder,
    steps: int = STEPS,
    *,
    classes: tuple[type, type] = (DPOTrainer, DPOConfig),
    rows: list[dict[str, object]] = ROWS,
    **loss: object,
) -> list[dict[str, float]]:
    make_trainer, make_args = classes
    args = make_args(
        **{"beta": BETA, "output_dir": str(folder), **loss},
        learning_rate=RATE,
        warmup_steps=0,
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    models = {"model": policy} if reference is None else {"model": policy, "ref_model": reference}
    trainer = make_trainer(**models, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of TRL's
def test_twenty_steps_are_those_of_trl(make_policy, tokenizer, scored, tmp_path):
    def policy(seed: int) -> PreTrainedModel:
        return make_policy(seed, initializer_range=0.1)

    ours, theirs = policy(0), policy(0)
    expected = train_with_trl(theirs, policy(1), tokenizer, tmp_path / "trl")
    lines = [json.dumps(row).encode() for row in ROWS]
    groups = scored([encode_group(group, tokenizer) for group in read_groups(lines)], policy(1))
    config = TrainConfig(
        objective=o.Dpo(beta=BETA),
        optim=Optim(learning_rate=RATE, warmup_ratio=0.0),
        batch_size=BATCH_SIZE,
        n_epochs=STEPS // 2,
        checkpoint_steps=STEPS,
    )
    batches = [groups[:BATCH_SIZE], groups[BATCH_SIZE:]] * (STEPS // 2)
    found = [
        result.metrics
        for result in train(config, ours, tokenizer, batches, total_steps=STEPS, checkpoint_dir=tmp_path / "ours")
    ]
    assert len(found) == len(expected) == STEPS
    assert expected[-1]["loss"] < 0.9 * expected[0]["loss"]  # it learns, so there is something to compare
    for step, (own, other) in enumerate(zip(found, expected, strict=True), 1):
        for key in own.keys() & other.keys() | THEIR_KEYS.keys():
            assert own[key] == pytest.approx(other[THEIR_KEYS.get(key, key)], rel=1e-4, abs=1e-4), (step, key)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_twenty_steps_of_a_mixture_of_experts_are_those_of_trl(kind, make_mixture, tokenizer, scored, tmp_path):
    """TRL balances the experts over each padded batch, which here is the global batch. We cut it into packs."""
    ours, theirs, reference = (make_mixture(kind, seed, initializer_range=0.1) for seed in (0, 0, 1))
    expected = train_with_trl(theirs, reference, tokenizer, tmp_path / "trl")
    groups = scored(
        [encode_group(group, tokenizer) for group in read_groups([json.dumps(row).encode() for row in ROWS])],
        make_mixture(kind, 1, initializer_range=0.1),
    )
    config = TrainConfig(
        objective=o.Dpo(beta=BETA),
        optim=Optim(learning_rate=RATE, warmup_ratio=0.0),
        batch_size=BATCH_SIZE,
        n_epochs=STEPS // 2,
        max_length=64,
        max_tokens_per_pack=64,  # several packs to a step
        checkpoint_steps=STEPS,
    )
    batches = [groups[:BATCH_SIZE], groups[BATCH_SIZE:]] * (STEPS // 2)
    found = list(train(config, ours, tokenizer, batches, total_steps=STEPS, checkpoint_dir=tmp_path / "ours"))
    for own, other in zip(found, expected, strict=True):
        whole = own.metrics["loss"] + ours.config.router_aux_loss_coef * own.metrics["aux_loss"]
        assert whole == pytest.approx(other["loss"], rel=1e-4, abs=1e-4), own.step
        for key in ("aux_loss", "rewards/margins", "logps/chosen", "logps/rejected"):
            assert own.metrics[key] == pytest.approx(other[key], rel=1e-4, abs=1e-4), (own.step, key)
        assert own.metrics["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3, abs=1e-4)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=1e-3, atol=1e-4)


def agree(found: list[StepResult], expected: list[dict[str, float]], tolerance: float) -> bool:
    return all(
        own.metrics[key] == pytest.approx(other[key], rel=tolerance, abs=tolerance)
        for own, other in zip(found, expected, strict=True)
        for key in ("loss", "rewards/margins", "logps/chosen", "logps/rejected")
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("dtype", "quantization", "tolerance"),
    [(torch.float32, None, 1e-4), (torch.bfloat16, None, 3e-2), (torch.float32, "nf4", 1e-4)],
    ids=["float32", "bfloat16", "nf4"],
)
def test_twenty_steps_of_an_adapter_are_those_of_trl(
    dtype, quantization, tolerance, make_policy, tokenizer, scored, tmp_path
):
    """Training starts from a trained adapter, which as it was is also the reference. TRL computes in float32 in all
    cases, on a base that for NF4 is rounded. A wrong sign or scale of the adapter, of its gradient or of NF4's blocks
    goes beyond the tolerance."""
    make_policy(0, initializer_range=0.1).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if quantization:
        round_to_nf4(base)
    theirs = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, weight in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    theirs.save_pretrained(tmp_path / "adapter")
    expected = train_with_trl(theirs, None, tokenizer, tmp_path / "trl")
    encoded = [encode_group(group, tokenizer) for group in read_groups([json.dumps(row).encode() for row in ROWS])]
    config = TrainConfig(
        objective=o.Dpo(beta=BETA),
        optim=Optim(learning_rate=RATE, warmup_ratio=0.0),
        batch_size=BATCH_SIZE,
        n_epochs=STEPS // 2,
        checkpoint_steps=STEPS,
    )

    def run(spoil: Callable[[nn.Module], object], rows: list[EncodedGroup] = encoded) -> list[StepResult]:
        ours, reference = (
            load_policy(tmp_path / "base", adapter=tmp_path / "adapter", dtype=dtype, quantization=quantization)
            for _ in range(2)
        )
        with torch.no_grad():
            for policy in (ours, reference):
                for module in policy.modules():
                    spoil(module)
        groups = scored(rows, reference.requires_grad_(False))
        batches = [groups[:BATCH_SIZE], groups[BATCH_SIZE:]] * (STEPS // 2)
        return list(train(config, ours, tokenizer, batches, total_steps=STEPS, checkpoint_dir=tmp_path / "ours"))

    assert agree(run(lambda module: None), expected, tolerance)
    spoiled = [scaled_adapter(-1), scaled_adapter(2)] + [scaled_blocks(-1), scaled_blocks(2)] * bool(quantization)
    for spoil in spoiled:
        assert not agree(run(spoil), expected, tolerance)
    swapped = [replace(group, completion_ids=group.completion_ids[::-1]) for group in encoded]
    for step in (backwards := run(lambda module: None, swapped)):
        chosen, rejected = (step.metrics[f"logps/{side}"] for side in ("chosen", "rejected"))
        step.metrics.update({"logps/chosen": rejected, "logps/rejected": chosen})
        step.metrics["rewards/margins"] *= -1
        step.metrics["loss"] = expected[step.step - 1]["loss"]
    assert agree(backwards[:1], expected[:1], tolerance)  # nothing is learned yet
    assert not agree(backwards, expected, tolerance)


def scaled_adapter(factor: float) -> Callable[[nn.Module], object]:
    def spoil(module: nn.Module) -> None:
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= factor

    return spoil


def scaled_blocks(factor: float) -> Callable[[nn.Module], object]:
    def spoil(module: nn.Module) -> None:
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            state.offset, state.state2.absmax = state.offset * factor, state.state2.absmax * factor

    return spoil


def assert_same_four_steps(objective: o.Objective, groups: list[EncodedGroup], policy, tokenizer, folder, expected):
    config = TrainConfig(
        objective=objective,
        optim=Optim(learning_rate=RATE, warmup_ratio=0.0),
        batch_size=BATCH_SIZE,
        n_epochs=2,
        max_length=64,
        max_tokens_per_pack=64,  # several packs to a step
        checkpoint_steps=4,
    )
    batches = [groups[:BATCH_SIZE], groups[BATCH_SIZE:]] * 2
    found = list(train(config, policy, tokenizer, batches, total_steps=4, checkpoint_dir=folder))
    for own, other in zip(found, expected, strict=True):
        for key in {"loss", "kl"} & other.keys():
            assert own.metrics[key] == pytest.approx(other[key], rel=1e-4, abs=1e-4), key
        assert own.metrics["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3, abs=1e-4)


EXO = {"loss_type": "exo_pair", "label_smoothing": 0.05}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("objective", "loss"),
    [
        (o.Ipo(), {"loss_type": "ipo"}),
        (o.Hinge(), {"loss_type": "hinge"}),
        (o.DpoNorm(), {"loss_type": "sigmoid_norm", "beta": 5.0}),
        (o.RobustDpo(), {"loss_type": "robust", "label_smoothing": 0.1}),
        (o.Exo(label_smoothing=0.05), EXO),
        (o.Nca(), {"loss_type": "nca_pair"}),
        (o.Sppo(), {"loss_type": "sppo_hard"}),
        (o.Aot(), {"loss_type": "aot"}),
        (o.Aot(paired=False, label_smoothing=0.1), {"loss_type": "aot_unpaired", "label_smoothing": 0.1}),
        (o.ApoZero(), {"loss_type": "apo_zero"}),
        (o.ApoDown(), {"loss_type": "apo_down"}),
        (o.Discopop(), {"loss_type": "discopop"}),
        (o.LdDpo(), {"ld_alpha": 0.5}),
        (o.FDpo(divergence="forward_kl"), {"f_divergence_type": "forward_kl"}),
        (o.FDpo(divergence="jensen_shannon"), {"f_divergence_type": "js_divergence"}),
        (
            o.FDpo(divergence="alpha", alpha=0.3),
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
        ),
    ],
    ids=lambda value: value.type if hasattr(value, "type") else "",
)
def test_each_loss_is_that_of_trl(make_policy, tokenizer, scored, tmp_path, objective, loss):
    def policy(seed: int) -> PreTrainedModel:
        return make_policy(seed, initializer_range=0.1)

    expected = train_with_trl(policy(0), policy(1), tokenizer, tmp_path / "trl", steps=4, **loss)
    lines = [json.dumps(row).encode() for row in ROWS]
    groups = scored([encode_group(group, tokenizer) for group in read_groups(lines)], policy(1))
    assert_same_four_steps(objective, groups, policy(0), tokenizer, tmp_path / "ours", expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("undesirable_weight", [1.0, 1.5])
def test_kto_is_that_of_trl(make_policy, tokenizer, scored, tmp_path, undesirable_weight):
    """z0 is estimated from each prompt with the completion of the row before it in the batch."""

    def policy(seed: int) -> PreTrainedModel:
        return make_policy(seed, initializer_range=0.1)

    rows = [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": i % 3 > 0}
        for i, row in enumerate(ROWS)
    ]
    expected = train_with_trl(
        policy(3),
        policy(0),
        tokenizer,
        tmp_path / "trl",
        steps=4,
        classes=(KTOTrainer, KTOConfig),
        rows=rows,
        undesirable_weight=undesirable_weight,
    )
    assert expected[0]["kl"] > 0
    encoded = [encode_group(Group(row["prompt"], (row["completion"],), 1), tokenizer) for row in rows]
    before = [i - 1 if i % BATCH_SIZE else i - 1 + BATCH_SIZE for i in range(len(rows))]
    groups = [
        replace(
            group,
            completion_ids=(*group.completion_ids, *encoded[other].completion_ids),
            ratings=(float(row["label"]), math.nan),
        )
        for group, row, other in zip(encoded, rows, before, strict=True)
    ]
    objective = o.Kto(undesirable_weight=undesirable_weight)
    assert_same_four_steps(objective, scored(groups, policy(0)), policy(3), tokenizer, tmp_path / "ours", expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("margins", [False, True], ids=["without margins", "with margins"])
def test_twenty_steps_of_a_reward_model_are_those_of_trl(make_policy, tokenizer, tmp_path, margins):
    make_policy(0, initializer_range=0.1).save_pretrained(tmp_path / "base")
    theirs = load_reward_model(tmp_path / "base")
    ours = deepcopy(theirs)
    rows = [row | {"margin": i % 3 / 2} for i, row in enumerate(ROWS)] if margins else ROWS
    expected = train_with_trl(
        theirs,
        None,
        tokenizer,
        tmp_path / "trl",
        classes=(RewardTrainer, lambda beta, **options: RewardConfig(**options)),
        rows=rows,
    )
    encoded = [encode_group(group, tokenizer) for group in read_groups([json.dumps(row).encode() for row in ROWS])]
    groups = [replace(group, margin=row.get("margin")) for group, row in zip(encoded, rows, strict=True)]
    config = TrainConfig(
        objective=o.RewardBradleyTerry(),
        optim=Optim(learning_rate=RATE, warmup_ratio=0.0),
        batch_size=BATCH_SIZE,
        n_epochs=STEPS // 2,
        checkpoint_steps=STEPS,
    )
    batches = [groups[:BATCH_SIZE], groups[BATCH_SIZE:]] * (STEPS // 2)
    found = list(train(config, ours, tokenizer, batches, total_steps=STEPS, checkpoint_dir=tmp_path / "ours"))
    assert expected[-1]["loss"] < 0.9 * expected[0]["loss"]
    for own, other in zip(found, expected, strict=True):
        for key in ("loss", "grad_norm", "min_reward", "mean_reward", "max_reward", "accuracy", "margin"):
            assert own.metrics[key] == pytest.approx(other[key], rel=1e-4, abs=1e-4), (own.step, key)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=1e-3, atol=1e-4)


TEXTS = [
    {
        "prompt": "<s>" + " ".join(WORDS[i % 5 : 3 + i % 9]),
        "chosen": "".join(f" {word}" for word in WORDS[i % 6 : 6] + WORDS[: i % 6]),  # always as many tokens
        "rejected": "".join(f" {word}" for word in WORDS[-3 - i % 10 :]),
    }
    for i in range(2 * BATCH_SIZE)
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("objective", "name", "loss"),
    [
        (o.Orpo(), "ORPO", {}),
        (o.Orpo(odds_weight=2.0), "ORPO", {"beta": 2.0}),
        (o.Cpo(), "CPO", {}),
        (o.Cpo(nll_weight=0.0), "CPO", {"cpo_alpha": 0.0}),
        (o.Simpo(), "CPO", {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.5, "simpo_gamma": 1.25}),
    ],
    ids=lambda value: value.type if hasattr(value, "type") else "",
)
def test_each_loss_without_reference_is_that_of_trl(make_policy, tokenizer, tmp_path, objective, name, loss):
    """TRL takes the mean of the likelihood term over the batch's tokens, with ORPO over the prompts' tokens, too.

    Ours is a mean over the tokens of each chosen completion. Both are equal if all chosen completions have the same
    length, and ORPO's prompts are one BOS token.
    """
    module = importlib.import_module(f"trl.experimental.{name.lower()}")
    classes = getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")
    rows = [row | {"prompt": "<s>"} for row in TEXTS] if name == "ORPO" else TEXTS
    policies = [make_policy(0, initializer_range=0.1) for _ in range(2)]
    expected = train_with_trl(
        policies[0], None, tokenizer, tmp_path / "trl", steps=4, classes=classes, rows=rows, **loss
    )
    groups = [encode_group(group, tokenizer) for group in read_groups([json.dumps(row).encode() for row in rows])]
    assert_same_four_steps(objective, groups, policies[1], tokenizer, tmp_path / "ours", expected)
