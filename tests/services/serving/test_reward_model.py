"""Tests a trained reward model in its replica, and in vLLM with no option but the runner."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpo_core.config import Lora, Optim, TrainConfig
from dpo_core.encoding.encode import EncodedGroup
from dpo_core.models.model import agree_on_padding, load_reward_model, load_tokenizer, merge_adapter
from dpo_core.options import RewardBradleyTerry
from dpo_core.policy.scorer import Scorer
from dpo_core.training.trainer import train
from services.serving import reward_model

GROUPS = [
    EncodedGroup([5, 6, 7], ([8, 9, 1], [10, 1]), None, 1),
    EncodedGroup(list(range(5, 60)), (list(range(60, 99)), [11]), None, 2),
]


@pytest.mark.parametrize("num_outputs", [1, 2])
@pytest.mark.parametrize("tokens_per_pack", [10, 4096])
def test_a_replica_gives_the_outputs_of_transformers(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, num_outputs: int, tokens_per_pack: int
) -> None:
    """This holds also if the completions of one prompt are divided over several forward passes."""
    monkeypatch.setattr(reward_model, "MAX_TOKENS_PER_PACK", tokens_per_pack)
    model = load_reward_model(model_folder, num_outputs=num_outputs)
    agree_on_padding(model, load_tokenizer(model_folder))  # as the trainer saves it
    groups = [GROUPS[0], GROUPS[1], EncodedGroup([7, 8], tuple([9 + i, 1] for i in range(7)), None, 3)]
    outputs = asyncio.run(reward_model.Rewards(Scorer(model), num_outputs).score(groups))
    for group, found in zip(groups, outputs, strict=True):
        for ids, row in zip(group.completion_ids, found, strict=True):
            wanted = model(torch.tensor([[*group.prompt_ids, *ids]])).logits[0].tolist()
            assert row == pytest.approx(wanted, abs=1e-4, rel=0)


@pytest.mark.ray
def test_vllm_gives_the_rewards_themselves(model_folder: Path, tmp_path: Path) -> None:
    model = load_reward_model(model_folder, adapter=Lora(r=4))
    config = TrainConfig(
        objective=RewardBradleyTerry(), optim=Optim(learning_rate=1e-2), n_epochs=4, batch_size=2, checkpoint_steps=4
    )
    for _ in train(
        config, model, load_tokenizer(model_folder), [GROUPS] * 4, total_steps=4, checkpoint_dir=tmp_path / "run"
    ):
        pass
    merge_adapter(tmp_path / "run" / "step-000004" / "model", tmp_path / "merged")
    rows = [[*group.prompt_ids, *completion] for group in GROUPS for completion in group.completion_ids]
    script, answer = Path(__file__).with_name("classify.py"), tmp_path / "rewards.json"
    command = [sys.executable, script, tmp_path / "merged", answer]
    subprocess.run(command, input=json.dumps(rows), text=True, check=True, timeout=300)
    scorer = Scorer(model)
    rewards = scorer(scorer.collate(GROUPS))[:, :1]
    assert rewards.min() < 0  # no probabilities
    torch.testing.assert_close(torch.tensor(json.loads(answer.read_text())), rewards, rtol=0, atol=1e-3)
