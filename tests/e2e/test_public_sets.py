"""Tests that public preference datasets can be uploaded, checked and trained on, and that the policy answers."""

from typing import Any

import openai
import pytest

from tests.e2e.test_service import finished, messages
from tests.public_sets import PUBLIC_SETS

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.long]


@pytest.mark.parametrize("name", ["HH-RLHF", "HelpSteer and HelpSteer2", "ms-swift, KTO"])
def test_a_public_set_becomes_a_policy_that_answers(client: openai.OpenAI, name: str) -> None:
    public = PUBLIC_SETS[name]
    stored = client.files.create(file=("rows.jsonl", public.lines), purpose="fine-tune")
    checked: Any = client.post("/x/datasets/check", body={"training_file": stored.id, "model": "tiny"}, cast_to=object)
    assert checked["status"] == "completed"
    assert checked["report"]["tokens"]["num_groups"] == public.num_groups
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=stored.id,
        method={"type": public.method},  # type: ignore[typeddict-item]
        seed=1,
    )
    ended = finished(client, job.id)
    assert ended.status == "succeeded", messages(client, job.id)
    policy = ended.fine_tuned_model
    answer = client.chat.completions.create(
        model=policy, messages=[{"role": "user", "content": "Hello?"}], max_tokens=8, seed=1
    )
    assert answer.choices[0].finish_reason in ("stop", "length")
