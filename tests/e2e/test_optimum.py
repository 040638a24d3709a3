"""Tests that a served policy is the best policy that its paper promises, where every answer can be counted."""

import itertools
import json
import math
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_core.data.groups import Group
from dpo_core.encoding.encode import encode_group
from tests.e2e.conftest import Service
from tests.e2e.test_adapters import engine_logps, plain_logps, succeeded

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(1800)]

BETA, PROMPT = 1.0, "Which one?"
REWARDS = {"tea": 1.0, "milk": 0.5, "water": -0.3, "coffee": -1.0}


def preferences() -> bytes:
    """Returns each pair of answers in both orders, weighted as a Bradley-Terry model with the rewards prefers them."""
    rows = [
        {"prompt": PROMPT, "chosen": a, "rejected": b, "weight": 2 / (1 + math.exp(REWARDS[b] - REWARDS[a]))}
        for a, b in itertools.permutations(REWARDS, 2)
    ]
    return "\n".join(map(json.dumps, rows)).encode()


def test_the_engine_answers_with_the_optimum_of_reward_and_kl(service: Service, client: openai.OpenAI) -> None:
    """arXiv 2305.18290, equation 5: the log-ratio of policy and reference is r / beta, less the same number for each
    answer."""
    options: dict[str, Any] = {"beta": BETA, "n_epochs": 50, "batch_size": 12, "learning_rate": 2e-3}
    file = client.files.create(file=("pairs.jsonl", preferences()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        method={"type": "dpo", "dpo": {"hyperparameters": options}},  # type: ignore[arg-type]
    )
    policy = succeeded(client, job.id).fine_tuned_model

    folder = service.models["tiny"]
    encoded = encode_group(Group(PROMPT, tuple(REWARDS), 1), AutoTokenizer.from_pretrained(folder))
    prompt, answers = list(encoded.prompt_ids), [list(ids) for ids in encoded.completion_ids]
    reference = AutoModelForCausalLM.from_pretrained(folder)
    ref_logps = torch.stack([plain_logps(reference, prompt, answer).sum() for answer in answers])
    served = torch.stack([engine_logps(service, policy, prompt, answer).sum() for answer in answers])
    wanted = torch.tensor(list(REWARDS.values())) / BETA
    found = served - ref_logps  # in nats; the rewards span 2
    torch.testing.assert_close(found - found.mean(), wanted - wanted.mean(), rtol=0, atol=0.1)
