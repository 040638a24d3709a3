"""Tests which checkpoints of a job are kept, through a pause, a resumption and the death of a worker."""

import json
from typing import Any

import openai
import pytest

from tests.e2e.conftest import Service, wait_for
from tests.e2e.test_adapters import kill_a_worker, steps_of, succeeded
from tests.e2e.test_service import messages, shop_pairs, wait_for_step

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(1800)]

PATIENCE, EVERY = 60, 5


def contrary_pairs() -> bytes:
    """Returns held-out rows with exchanged answers, so that each step makes the policy worse on them."""
    rows = [json.loads(line) for line in shop_pairs(12).splitlines()]
    for row in rows:
        row["preferred_output"], row["non_preferred_output"] = row["non_preferred_output"], row["preferred_output"]
        row["input"]["messages"][0]["content"] += " Please."
    return "\n".join(map(json.dumps, rows)).encode()


def submit(client: openai.OpenAI, model: str, **extension: Any) -> str:
    files = [
        client.files.create(file=("rows.jsonl", rows), purpose="fine-tune").id
        for rows in (shop_pairs(60), contrary_pairs())
    ]
    hyperparameters = {"n_epochs": 50, "batch_size": 4, "learning_rate": 1e-4}
    job = client.fine_tuning.jobs.create(
        model=model,
        training_file=files[0],
        validation_file=files[1],
        method={"type": "dpo", "dpo": {"hyperparameters": hyperparameters}},  # type: ignore[typeddict-item]
        seed=5,
        extra_body={"x_raydpo": {"num_workers": 2, "checkpoint_steps": EVERY, **extension}},
    )
    return job.id


def test_what_stays_is_the_last_the_best_and_what_a_job_names(service: Service, client: openai.OpenAI) -> None:
    choice = {"keep_checkpoints": 1, "policy": "best", "early_stop": {"patience": PATIENCE}}
    undisturbed = succeeded(client, submit(client, "tiny", **choice))

    job_id = submit(client, "tiny", **choice)
    wait_for_step(client, job_id, 12)
    client.fine_tuning.jobs.pause(job_id)
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job_id).status == "paused", "paused")
    paused_at = client.fine_tuning.jobs.checkpoints.list(job_id).data[0]
    named = submit(client, paused_at.fine_tuned_model_checkpoint, **choice)
    client.fine_tuning.jobs.cancel(named)
    client.fine_tuning.jobs.resume(job_id)
    wait_for_step(client, job_id, paused_at.step_number + 2 * EVERY)
    kill_a_worker(service)
    disturbed = succeeded(client, job_id)

    last = (PATIENCE + 1) * EVERY  # the first evaluation is the best
    told = messages(client, job_id)
    assert f"Stopped early after step {last}: eval/loss has not improved at all in {PATIENCE} evaluations." in told
    chosen = f"The job's policy is the checkpoint of step {EVERY}, whose eval/loss"
    assert any(message.startswith(chosen) for message in told)
    assert sum(message.startswith("Training resumes from the checkpoint of step") for message in told) == 2
    assert steps_of(client, disturbed) == steps_of(client, undisturbed)
    kept = {checkpoint.step_number for checkpoint in client.fine_tuning.jobs.checkpoints.list(job_id)}
    assert kept == {EVERY, paused_at.step_number, last}
    others = {checkpoint.step_number for checkpoint in client.fine_tuning.jobs.checkpoints.list(undisturbed.id)}
    assert others == {EVERY, last}

    folder = service.home / "storage" / "runs" / job_id / "checkpoints"
    resumable = {path.parent.name for path in folder.glob("step-*/optimizer-*")}
    assert {f"step-{last:06d}"} <= resumable <= {f"step-{last:06d}", f"step-{last - EVERY:06d}"}
    wait_for(
        lambda: {path.name for path in folder.glob("step-*")} == {f"step-{step:06d}" for step in kept},
        "dropped checkpoints leave the storage",
        seconds=300,
    )
