"""The same rows through TRL's DPOTrainer. The policy differs from the reference: where it does not,
any code returns ln 2 and proves nothing."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from dpo_core.config import Dpo, Optim, TrainConfig
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


def train_with_trl(policy: PreTrainedModel, reference: PreTrainedModel, tokenizer, folder) -> list[dict[str, float]]:
    args = DPOConfig(
        output_dir=str(folder),
        beta=BETA,
        learning_rate=RATE,
        warmup_steps=0,
        max_steps=STEPS,
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
        objective=Dpo(beta=BETA),
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
        for key in own.keys() - {"tokens_per_second"}:
            assert own[key] == pytest.approx(other[THEIR_KEYS.get(key, key)], rel=1e-4, abs=1e-4), (step, key)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=1e-3, atol=1e-4)
