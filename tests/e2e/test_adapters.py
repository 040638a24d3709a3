"""Tests a LoRA adapter from its job to later jobs: its training survives a death, and PEFT and vLLM read the
adapter."""

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3Config

from dpo_core.encoding.encode import EncodedGroup
from dpo_core.models.model import load_policy
from dpo_core.policy.scorer import reference_token_logps
from tests.e2e.conftest import Service, running_service, tiny_model
from tests.e2e.test_service import finished, messages, shop_pairs, wait_for_step

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(1800)]

FAMILIES = ("llama", "qwen3")
BETA, RATE = 0.1, 3e-3
PAIRS = shop_pairs(64)
CLOCK = ("tokens_per_second", "hfu")


def make_models(folder: Path) -> dict[str, Path]:
    """Writes models of several families, each with some million random weights, and returns their folders."""
    models = {name: folder / name for name in FAMILIES}
    llama = tiny_model(models["llama"], hidden_size=256, num_layers=4)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.save_pretrained(models["qwen3"])
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=1 / 16,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(models["qwen3"])
    return models


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service(make_models) as service:
        yield service


def submit(client: openai.OpenAI, model: str, *, hyperparameters: dict[str, Any], **extension: Any) -> str:
    file = client.files.create(file=("pairs.jsonl", PAIRS), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=model,
        training_file=file.id,
        method={"type": "dpo", "dpo": {"hyperparameters": {"beta": BETA, **hyperparameters}}},  # type: ignore[typeddict-item]
        seed=1,
        extra_body={"x_raydpo": extension},
    )
    return job.id


def succeeded(client: openai.OpenAI, job_id: str) -> Any:
    job = finished(client, job_id)
    assert job.status == "succeeded", messages(client, job_id)
    return job


def steps_of(client: openai.OpenAI, job: Any) -> list[dict[str, str]]:
    """Returns all metrics of every step from the job's result file, without those that depend on the clock."""
    rows = csv.DictReader(client.files.content(job.result_files[0]).text.splitlines())
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


def kill_a_worker(service: Service) -> None:
    (_, worker) = [process for process in service.processes() if process.name().startswith("ray::RayTrainWo")]
    worker.kill()


def ids_of(tokenizer: Any) -> list[tuple[list[int], list[list[int]]]]:
    """Returns the token ids of each row's prompt and of its two answers.

    The chat template writes the whole dialogue; the answer is what follows the prompt.
    """
    rows = []
    for row in map(json.loads, PAIRS.splitlines()):
        asked = row["input"]["messages"]

        def ids(dialogue: Any, *, add_generation_prompt: bool = False) -> list[int]:
            text = tokenizer.apply_chat_template(dialogue, add_generation_prompt=add_generation_prompt, tokenize=False)
            return list(tokenizer(text, add_special_tokens=False).input_ids)

        prompt = ids(asked, add_generation_prompt=True)
        wholes = [ids([*asked, *row[side]]) for side in ("preferred_output", "non_preferred_output")]
        assert all(whole[: len(prompt)] == prompt for whole in wholes)
        rows.append((prompt, [whole[len(prompt) :] for whole in wholes]))
    return rows


@torch.no_grad()
def plain_logps(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> Tensor:
    """Returns the log-probability of each token of the answer, from one forward pass of transformers."""
    logps = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    return logps.gather(1, torch.tensor(answer)[:, None])[:, 0]


def engine_logps(service: Service, model: str, prompt: list[int], answer: list[int]) -> Tensor:
    """Returns the log-probability of each token of the answer, from vLLM.

    It uses the unmodified client, because the strict one would refuse an echo, whose first token has no
    log-probability.
    """
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=service.key, max_retries=5) as client:
        told = client.completions.create(model=model, prompt=prompt + answer, max_tokens=1, echo=True, logprobs=1)
    assert told.choices[0].logprobs is not None
    logps: Any = told.choices[0].logprobs.token_logprobs
    return torch.tensor(logps[len(prompt) : len(prompt) + len(answer)])


def first_loss(policy: PreTrainedModel, reference: PreTrainedModel, rows: Any) -> float:
    """Returns the DPO loss of all rows by the formula of its paper."""
    losses = []
    for prompt, answers in rows:
        chosen, rejected = (
            (plain_logps(policy, prompt, answer).sum() - plain_logps(reference, prompt, answer).sum()).double()
            for answer in answers
        )
        losses.append(-torch.nn.functional.logsigmoid(BETA * (chosen - rejected)))
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_trained_through_a_death_served_and_gone_on_with(
    service: Service, client: openai.OpenAI, family: str
) -> None:
    base_folder = service.models[family]
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    rows = ids_of(tokenizer)

    # A worker dies on the way, and no bit of the run's metrics changes.
    given: dict[str, Any] = {
        "hyperparameters": {"batch_size": 8, "n_epochs": 12, "learning_rate": RATE},
        "num_workers": 2,
        "checkpoint_steps": 20,
    }
    undisturbed = succeeded(client, submit(client, family, **given))
    killed_id = submit(client, family, **given)
    wait_for_step(client, killed_id, 25)
    kill_a_worker(service)
    killed = succeeded(client, killed_id)
    told = messages(client, killed_id)
    assert any(message.startswith("Training resumes from the checkpoint of step") for message in told)
    curve = steps_of(client, killed)
    assert len(curve) == 96
    assert curve == steps_of(client, undisturbed)
    assert float(curve[0]["train_loss"]) == pytest.approx(math.log(2), abs=1e-6)
    assert float(curve[-1]["train_loss"]) < 0.6

    # Its checkpoint is one model for PEFT, for vLLM and for the trainer.
    newest = client.fine_tuning.jobs.checkpoints.list(killed_id).data[0]
    name = newest.fine_tuned_model_checkpoint
    folder = service.home / "storage" / "runs" / killed_id / "checkpoints" / f"step-{newest.step_number:06d}" / "model"
    assert not list(folder.glob("model*.safetensors"))
    policy = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    trainers = load_policy(base_folder, adapter=folder).requires_grad_(False)
    groups = [EncodedGroup(prompt, tuple(answers), None, line) for line, (prompt, answers) in enumerate(rows[:8], 1)]
    for (prompt, answers), logps in zip(
        rows[:8], reference_token_logps(trainers, groups, max_tokens_per_pack=4096), strict=True
    ):
        for answer, own in zip(answers, logps, strict=True):
            plain = plain_logps(policy, prompt, answer)
            torch.testing.assert_close(torch.tensor(own), plain, rtol=0, atol=1e-4)
            torch.testing.assert_close(engine_logps(service, name, prompt, answer), plain, rtol=0, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()
    assert (plain_logps(base, *_one(rows)) - plain_logps(policy, *_one(rows))).abs().max() > 0.1

    # Another job goes on with it. Its reference is its start.
    whole: dict[str, Any] = {"hyperparameters": {"batch_size": len(rows), "learning_rate": RATE}}
    second = submit(client, name, **whole)
    (first,) = steps_of(client, succeeded(client, second))
    assert float(first["train_loss"]) == pytest.approx(math.log(2), abs=1e-6)
    assert (
        f"Training the adapter of {name}, of rank 32, further in float32; "
        f"the reference model is {name} as it is before the first step"
    ) in messages(client, second)
    for side, place in (("chosen", 0), ("rejected", 1)):
        mean = float(sum(plain_logps(policy, prompt, answers[place]).sum() for prompt, answers in rows)) / len(rows)
        assert float(first[f"logps_{side}"]) == pytest.approx(mean, abs=1e-3)

    # Another one stays near the base: its first loss is that of the adapter against the base.
    third = submit(client, name, reference={"model": family}, **whole)
    (first,) = steps_of(client, succeeded(client, third))
    wanted = first_loss(policy, base, rows)
    assert abs(wanted - math.log(2)) > 0.05
    assert float(first["train_loss"]) == pytest.approx(wanted, abs=1e-5)
    assert any(message.endswith(f"the reference model is {family}") for message in messages(client, third))


def _one(rows: Any) -> tuple[list[int], list[int]]:
    return rows[0][0], rows[0][1][0]
