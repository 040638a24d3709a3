"""The same rows through TRL's DPOTrainer. The policy differs from the reference: where it does not,
any code returns ln 2 and proves nothing."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from dpo_core import options as o
from dpo_core.config import Optim, TrainConfig
from dpo_core.encode import encode_group
from dpo_core.feedback import read_groups
from dpo_core.trainer import train

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
    policy: PreTrainedModel, reference: PreTrainedModel, tokenizer, folder, steps: int = STEPS, **loss: object
) -> list[dict[str, float]]:
    args = DPOConfig(
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
    dataset = Dataset.from_list(ROWS)
    trainer = DPOTrainer(policy, reference, args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


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


EXO = {"loss_type": "exo_pair", "label_smoothing": 0.05}


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
    found = list(train(config, policy(0), tokenizer, batches, total_steps=4, checkpoint_dir=tmp_path / "ours"))
    for own, other in zip(found, expected, strict=True):
        assert own.metrics["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-4)
        assert own.metrics["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3, abs=1e-4)
