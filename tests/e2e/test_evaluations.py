"""Tests evaluations with real models: answers, verdicts and scores come from vLLM in Ray Serve."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from demo.rows import Shop
from tests.e2e.conftest import Service, running_service, tiny_model, wait_for
from tests.e2e.test_kills import engine
from tests.e2e.test_rewards import HELD_OUT, measured, trained
from tests.e2e.test_service import messages

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(1800)]

PROMPTS = [{"prompt": row["input"]["messages"]} for row in HELD_OUT[:6]]
NUM_COMPARED = 200


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service(
        lambda folder: {"tiny": tiny_model(folder / "tiny"), "judge": judge_model(folder / "judge")}
    ) as service:
        yield service


def judge_model(folder: Path) -> Path:
    """Writes a model whose verdicts differ from question to question, and returns its folder.

    The layers of `tiny_model` have so small weights that its answer depends on the question's end alone, which all
    questions share. So it gives both orders of two answers the same letter, and finds only ties.
    """
    tiny_model(folder, num_layers=3)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            if weight.dim() == 2:
                weight *= 4
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policy(service: Service) -> str:
    with service.client() as client:
        return str(trained(client, "dpo", {"beta": 0.2}, precision="float32").fine_tuned_model)


def evaluated(client: openai.OpenAI, **body: Any) -> dict[str, Any]:
    """Runs an evaluation, and returns its results and its items."""
    made: Any = client.post("/x/evaluations", body=body, cast_to=object)
    while made["status"] in ("queued", "running"):
        time.sleep(0.5)
        made = client.get(f"/x/evaluations/{made['id']}", cast_to=object)
    assert made["status"] == "succeeded", made
    assert made["num_failed"] == 0
    return {**made["results"], "items": [item["found"] for item in items_of(client, made["id"])]}


def items_of(client: openai.OpenAI, evaluation_id: str) -> list[dict[str, Any]]:
    content = client.get(f"/x/evaluations/{evaluation_id}/content", cast_to=httpx.Response).content
    return list(map(json.loads, content.splitlines()))


def check_win_rate(found: dict[str, Any]) -> None:
    """Asserts that the win rate is the one that follows from the verdicts: the model wins a prompt if both orders of
    the answers say so, and a tie is half a win."""
    verdicts = [item["verdicts"] for item in found["items"]]
    assert [len(each) for each in verdicts] == [2] * NUM_COMPARED
    wins, losses = verdicts.count(["first", "first"]), verdicts.count(["second", "second"])
    ties = NUM_COMPARED - wins - losses
    assert wins + losses > 0  # the judge does not call all a tie
    assert (found["num_wins"], found["num_losses"], found["num_ties"]) == (wins, losses, ties)
    assert found["win_rate"]["value"] == (wins + ties / 2) / NUM_COMPARED


def test_a_served_model_judges_in_both_orders_and_mirrored_if_the_models_are_swapped(
    client: openai.OpenAI, policy: str
) -> None:
    prompts = dict.fromkeys(prompt for prompt, _ in Shop(num_things=8, num_held_out=8).demonstrations(1000))
    rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in list(prompts)[:NUM_COMPARED]]
    judged = {"kind": "compare", "judge": {"type": "model", "model": "judge"}, "rows": rows}
    judged |= {"sampling": {"max_tokens": 8, "temperature": 0}}
    there = evaluated(client, **judged, model=policy, baseline="tiny")
    back = evaluated(client, **judged, model="tiny", baseline=policy)
    check_win_rate(there)
    check_win_rate(back)
    mirrored = {"first": "second", "second": "first", "neither": "neither"}
    same = [
        (one, other)
        for one, other in zip(there["items"], back["items"], strict=True)
        if (one["answer"], one["baseline_answer"]) == (other["baseline_answer"], other["answer"])
    ]
    # An engine may round a sum otherwise in another batch, which can change a token that is likely by a hair.
    assert len(same) >= 0.95 * NUM_COMPARED
    for one, other in same:
        assert [mirrored[verdict] for verdict in reversed(one["verdicts"])] == other["verdicts"]  # the orders swap too
        assert {"win": "loss", "loss": "win", "tie": "tie"}[one["outcome"]] == other["outcome"]


def test_the_drift_is_measured_on_the_ids_that_the_policy_sampled(client: openai.OpenAI, policy: str) -> None:
    found = evaluated(client, kind="drift", model=policy, rows=PROMPTS, sampling={"max_tokens": 16})
    assert found["kl_per_sequence"]["value"] != 0
    for item in found["items"]:
        assert 1 <= item["num_tokens"] <= 16
        assert item["num_tokens"] == item["answer"]["num_tokens"]
        assert item["logp"] < 0
    same = evaluated(client, kind="drift", model="tiny", reference="tiny", rows=PROMPTS, sampling={"max_tokens": 16})
    assert same["kl_per_sequence"]["value"] == pytest.approx(0, abs=1e-5)


def test_preferences_are_those_of_the_rewards_that_clients_get(client: openai.OpenAI, policy: str) -> None:
    rows = [
        {"prompt": row["input"]["messages"], "completions": [row["preferred_output"], row["non_preferred_output"]]}
        for row in HELD_OUT
    ]
    found = evaluated(client, kind="preferences", model=policy, rows=rows)
    answer: Any = client.post("/x/rewards", body={"model": policy, "rows": rows}, cast_to=object)
    rewards = [[each["reward"] for each in row["completions"]] for row in answer["data"]]
    assert [item["rewards"] for item in found["items"]] == [pytest.approx(row, abs=1e-4) for row in rewards]
    assert found["accuracy"]["value"] == sum(chosen > rejected for chosen, rejected in rewards) / len(rows)


def test_an_evaluation_goes_on_after_kills_of_the_engine_and_of_the_service(service: Service, policy: str) -> None:
    rows, num_before = PROMPTS * 40, 32
    sampling = {"max_tokens": 256}
    body = {"kind": "score", "model": policy, "judge": {"type": "length"}, "rows": rows, "sampling": sampling}

    def look(client: openai.OpenAI) -> Any:
        return client.get(f"/x/evaluations/{made['id']}", cast_to=object)

    def answers(client: openai.OpenAI) -> dict[str, Any]:
        items = items_of(client, made["id"])
        return {item["id"]: item["found"]["answer"] for item in items if "answer" in item["found"]}

    def num_requests(client: openai.OpenAI) -> int:
        usage: Any = client.get("/x/usage?group_by=model", cast_to=object)
        return sum(each["num_requests"] for each in usage["data"] if each["id"] == policy)

    with service.client() as client:
        made: Any = client.post("/x/evaluations", body=body, cast_to=object)
        wait_for(lambda: len(answers(client)) >= num_before, "the evaluation begins")
        before = answers(client)
        engine(service, "tiny").kill()
    service.kill()
    service.start()
    with service.client() as client:
        num_counted, kept = num_requests(client), answers(client)
        assert before.items() <= kept.items()
        assert len(kept) < len(rows)
        wait_for(lambda: look(client)["status"] == "succeeded", "the evaluation ends")
        after = look(client)
        assert (after["num_completed"], after["num_failed"]) == (len(rows), 0)
        assert kept.items() <= answers(client).items()
        # Seeds make a repeated answer equal the first one, so the number of requests shows that none was repeated.
        missing = len(rows) - len(kept)
        num_asked = wait_for(
            lambda: (asked := num_requests(client) - num_counted) >= missing and asked, "all are counted"
        )
        assert num_asked < missing + num_before


def test_a_rule_scores_answers_of_a_file(client: openai.OpenAI, policy: str) -> None:
    rows = "\n".join(map(json.dumps, HELD_OUT)).encode()
    file = client.files.create(file=("pairs.jsonl", rows), purpose="fine-tune")
    judge = {"type": "regex", "pattern": "."}
    found = evaluated(client, kind="score", model=policy, judge=judge, file=file.id, max_items=4)
    assert found["score"]["value"] == sum(bool(item["answer"]["text"].strip()) for item in found["items"]) / 4


def test_a_job_has_its_checkpoints_and_its_policy_evaluated(client: openai.OpenAI) -> None:
    rows = "\n".join(map(json.dumps, HELD_OUT)).encode()
    file = client.files.create(file=("pairs.jsonl", rows), purpose="fine-tune").id
    asked = {
        "prefers": {"kind": "preferences", "file": file, "of": "checkpoints"},
        "says": {"kind": "score", "judge": {"type": "regex", "pattern": "."}, "file": file, "max_items": 4},
    }
    job = trained(client, "dpo", {"beta": 0.2}, precision="float32", checkpoint_steps=1, evaluations=asked)

    def ended() -> list[dict[str, Any]]:
        shown: Any = client.get(f"/fine_tuning/jobs/{job.id}", cast_to=object)
        found = shown["x_raydpo"]["evaluations"]
        return found if all(each["status"] in ("succeeded", "failed", "cancelled") for each in found) else []

    found = wait_for(ended, "the evaluations of the job end")
    by_model = {
        (each["name"], each["model"]): client.get(f"/x/evaluations/{each['id']}", cast_to=object) for each in found
    }
    steps = [f"{job.fine_tuned_model}:ckpt-step-{step}" for step in (1, 2, 3)]
    assert by_model.keys() == {("says", job.fine_tuned_model), *(("prefers", step) for step in steps)}
    results: Any = {key: each["results"] for key, each in by_model.items()}  # type: ignore[index]
    # The policy has the weights of the last checkpoint, whose validation measured the same pairs.
    last = results["prefers", steps[-1]]
    assert last["accuracy"]["value"] == pytest.approx(measured(client, job)["full_valid_reward_accuracy"], abs=1e-6)
    assert last["margin"]["value"] == pytest.approx(measured(client, job)["full_valid_reward_margin"], abs=1e-3)
    told = {
        f"Evaluation '{name}' of {model} {how}"
        for (name, model), each in by_model.items()
        for how in (f"created: {each['id']}", "succeeded")  # type: ignore[index]
    }
    wait_for(lambda: told <= set(messages(client, job.id)), "the job tells of its evaluations")
