"""Tests three rounds on the demo's task, from a policy that is courteous half of the time, on a real Ray and vLLM."""

import json
import logging
import os
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai
import pytest

from demo.base_model import make_base_model
from demo.rows import IS_COURTEOUS, Shop
from tests.e2e.conftest import Service, running_service, wait_for
from tests.e2e.test_service import finished, messages

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(3600)]

log = logging.getLogger(__name__)

SHOP = Shop(num_things=12, num_held_out=60)
DEMONSTRATIONS = list(SHOP.demonstrations(800))
PROMPTS = [prompt for prompt, _ in SHOP.demonstrations(80)]
HELD_OUT = SHOP.held_out_prompts() * 3  # each prompt has a seed of its own
NUM_ROUNDS, NUM_SAMPLES, RATE = 3, 4, 8e-4


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    def models(folder: Path) -> dict[str, Path]:
        text = [f"{prompt} {answer}" for prompt, answer in DEMONSTRATIONS]
        make_base_model(folder / "tiny", text, hidden_size=128, num_layers=2)
        return {"tiny": folder / "tiny"}

    with running_service(models) as service:
        yield service


def first_policy(client: openai.OpenAI) -> str:
    """Trains a policy on demonstrations, of which half are courteous and half are curt."""
    rows = (
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
        for prompt, answer in DEMONSTRATIONS
    )
    file = client.files.create(file=("rows.jsonl", "\n".join(map(json.dumps, rows)).encode()), purpose="fine-tune")
    schedule: Any = {"n_epochs": 6, "batch_size": 32, "learning_rate": 3e-3}
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        method={"type": "supervised", "supervised": {"hyperparameters": schedule}},
        extra_body={"x_raydpo": {"adapter": "none"}},
        seed=0,
    )
    job = finished(client, job.id)
    assert job.status == "succeeded", messages(client, job.id)
    return str(job.fine_tuned_model)


def chats(prompts: list[str]) -> list[dict[str, Any]]:
    return [{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts]


def improved(client: openai.OpenAI, policy: str, *, learning_rate: float = RATE) -> str:
    """Creates the rounds, and returns their id."""
    schedule = {"beta": 0.1, "n_epochs": 1, "batch_size": 16, "learning_rate": learning_rate}
    body = {
        "model": policy,
        "rows": chats(PROMPTS),
        "num_rounds": NUM_ROUNDS,
        "num_samples": NUM_SAMPLES,
        "sampling": {"max_tokens": 40},
        "judge": {"type": "regex", "pattern": IS_COURTEOUS},
        "job": {"method": {"type": "dpo", "dpo": {"hyperparameters": schedule}}, "seed": 0},
        "evaluation": {"rows": chats(HELD_OUT)},
    }
    created: Any = client.post("/x/rounds", body=body, cast_to=object)
    return str(created["id"])


def look(client: openai.OpenAI, rounds_id: str) -> dict[str, Any]:
    found: Any = client.get(f"/x/rounds/{rounds_id}", cast_to=object)
    assert found["status"] in ("running", "succeeded"), found
    return dict(found)


def is_training(service: Service, client: openai.OpenAI, rounds_id: str, number: int) -> str | None:
    """Returns the job of the round with this number, if its driver runs."""
    found = look(client, rounds_id)["rounds"]
    job_id = found[number]["job"] if len(found) > number else None
    return job_id if job_id and service.processes(f"runs/{job_id}/attempts/1.json") else None


def test_the_reward_rises_in_each_of_three_rounds_though_a_driver_is_killed(service: Service) -> None:
    with service.client() as client:
        policy = first_policy(client)
        rounds_id = improved(client, policy)
        job_id = wait_for(lambda: is_training(service, client, rounds_id, 2), "the second round trains", seconds=1800)
        for driver in service.processes(f"runs/{job_id}/attempts/1.json"):
            os.kill(driver.pid, signal.SIGKILL)
        wait_for(lambda: look(client, rounds_id)["status"] == "succeeded", "the rounds end", seconds=1800)
        rounds = look(client, rounds_id)["rounds"]
        log.info("%s", json.dumps(rounds, indent=1))
        assert any(message.startswith("Attempt 1 of the job ended: ") for message in messages(client, job_id))
        scores = [entry["score"]["value"] for entry in rounds]
        assert 0.3 < scores[0] < 0.7
        assert all(before < after for before, after in pairwise(scores)), scores
        assert [entry["number"] for entry in rounds if entry["kl"]] == [1, 2, 3]
        assert rounds[NUM_ROUNDS]["kl"]["low"] > 0  # after one round it may be so small that its estimate is below 0
        for entry in rounds[1:]:
            rows = [json.loads(line) for line in client.files.content(entry["file"]).text.splitlines()]
            assert len(rows) == entry["rows"]["num_rows"] >= 10
            for row in rows:
                assert (row["score_chosen"], row["score_rejected"]) == (1, 0)
                assert row["prompt"][0]["content"] in PROMPTS
