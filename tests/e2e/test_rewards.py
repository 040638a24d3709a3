"""Tests rewards of trained models, from vLLM and plain torch in Ray Serve, against the metrics of their jobs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.conftest import Service
from tests.e2e.test_service import finished, messages, shop_pairs

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(1800)]

BETA, RATE = 0.2, 1e-3
HELD_OUT = [json.loads(line) for line in shop_pairs(40).splitlines()[-16:]]
ROWS = [
    {"prompt": row["input"]["messages"], "completions": [row["preferred_output"], row["non_preferred_output"]]}
    for row in HELD_OUT
]


def trained(client: openai.OpenAI, method: str, hyperparameters: dict[str, Any], **extension: Any) -> Any:
    """Runs a job of a few large steps that is evaluated on HELD_OUT, and returns the finished job."""
    train, valid = shop_pairs(24), "\n".join(map(json.dumps, HELD_OUT)).encode()
    files = [client.files.create(file=("pairs.jsonl", rows), purpose="fine-tune").id for rows in (train, valid)]
    options = {"n_epochs": 1, "batch_size": 8, "learning_rate": RATE, **hyperparameters}
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=files[0],
        validation_file=files[1],
        method={"type": method, method: {"hyperparameters": options}},  # type: ignore[misc]
        seed=1,
        extra_body={"x_raydpo": extension},
    )
    job = finished(client, job.id)
    assert job.status == "succeeded", messages(client, job.id)
    return job


def measured(client: openai.OpenAI, job: Any) -> dict[str, float]:
    """Returns the metrics of the job's last checkpoint, whose weights are those of the policy."""
    checkpoints: Any = client.get(f"/fine_tuning/jobs/{job.id}/checkpoints", cast_to=object)
    return dict(checkpoints["data"][0]["metrics"])


def rewards_of(client: openai.OpenAI, model: str) -> list[dict[str, Any]]:
    answer: Any = client.with_options(timeout=600).post(
        "/x/rewards", body={"model": model, "rows": ROWS}, cast_to=object
    )
    return list(answer["data"])


def mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


@torch.no_grad()
def plain_log_ratios(folder: Path, base: Path) -> list[list[float]]:
    """Returns the log-ratios of the held-out rows' answers, computed with transformers alone.

    The chat template writes the whole dialogue; the answer is what follows the question.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    load = AutoModelForCausalLM.from_pretrained
    policy, reference = (load(each, dtype=torch.float32).eval() for each in (folder, base))

    def ids(dialogue: Any, **options: bool) -> list[int]:
        text = tokenizer.apply_chat_template(dialogue, tokenize=False, **options)
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    def logp(model: Any, prompt: list[int], whole: list[int]) -> float:
        logps = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        return float(logps.gather(1, torch.tensor(whole[len(prompt) :])[:, None]).sum())

    found = []
    for row in ROWS:
        prompt = ids(row["prompt"], add_generation_prompt=True)
        wholes = [ids([*row["prompt"], *completion]) for completion in row["completions"]]
        found.append([logp(policy, prompt, whole) - logp(reference, prompt, whole) for whole in wholes])
    return found


@pytest.mark.parametrize("adapter", ["none", {"type": "lora", "r": 8}], ids=["whole", "adapter"])
def test_implicit_rewards_are_those_of_the_jobs_own_evaluation(
    service: Service, client: openai.OpenAI, adapter: object
) -> None:
    job = trained(client, "dpo", {"beta": BETA}, adapter=adapter, precision="float32")
    metrics, found = measured(client, job), rewards_of(client, job.fine_tuned_model)
    sides = [[row["completions"][side]["reward"] for row in found] for side in (0, 1)]
    assert mean(iter(sides[0])) == pytest.approx(metrics["eval/rewards/chosen"], abs=1e-4)
    assert mean(iter(sides[1])) == pytest.approx(metrics["eval/rewards/rejected"], abs=1e-4)
    right = mean(float(chosen > rejected) for chosen, rejected in zip(*sides, strict=True))
    assert right == metrics["full_valid_reward_accuracy"]
    assert abs(metrics["full_valid_reward_margin"]) > 0.01  # it has learned
    if adapter == "none":
        export = service.home / "storage" / "runs" / job.id / "export"
        plain = plain_log_ratios(export, service.models["tiny"])
        told = [[each["log_ratio"] for each in row["completions"]] for row in found]
        assert torch.tensor(told) == pytest.approx(torch.tensor(plain), abs=1e-4)


def test_a_reward_models_rewards_are_those_of_its_jobs_own_evaluation(client: openai.OpenAI) -> None:
    job = trained(client, "reward_bradley_terry", {}, precision="float32")
    metrics, found = measured(client, job), rewards_of(client, job.fine_tuned_model)
    leads = [row["completions"][0]["reward"] - row["completions"][1]["reward"] for row in found]
    assert mean(iter(leads)) == pytest.approx(metrics["eval/margin"], abs=1e-4)
    assert mean(float(lead > 0) for lead in leads) == metrics["eval/accuracy"]
    chat = [{"role": "user", "content": "Where do I find a red saw?"}]
    with pytest.raises(openai.BadRequestError, match="POST /v1/x/rewards"):
        client.chat.completions.create(model=job.fine_tuned_model, messages=chat)  # type: ignore[arg-type]
