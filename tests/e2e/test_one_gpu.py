"""One GPU, on which engines and jobs take turns. Ray counts a GPU that is not there; engines run on CPUs."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.conftest import Service, running_service, tiny_model, wait_for
from tests.e2e.test_service import finished, messages, shop_pairs, wait_for_step

pytestmark = [pytest.mark.e2e, pytest.mark.ray]

PATIENT = {"RAYDPO_MODEL_WAIT_SECONDS": "900", "RAYDPO_NUM_GPUS_PER_MODEL": "1"}
HALVES = ("one", "two", "three")


def submit(client: openai.OpenAI, count: int, epochs: int) -> str:
    """A DPO job whose reference an engine must score."""
    file = client.files.create(file=("pairs.jsonl", shop_pairs(count)), purpose="fine-tune")
    own = {"reference": {"source": "serve"}, "adapter": "none"}
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        method={"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": epochs, "batch_size": 4}}},
        extra_body={"x_raydpo": own},
    )
    return job.id


def chat(client: openai.OpenAI, model: str) -> int:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Where do I find a red saw?"}], max_tokens=4, timeout=1000
    )
    assert answer.usage is not None
    return answer.usage.completion_tokens


def models(folder: Path) -> dict[str, Path]:
    """One model under several names."""
    return dict.fromkeys(("tiny", *HALVES), tiny_model(folder / "tiny"))


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """One `tiny` fits on the GPU, or its scorer, or two of HALVES."""
    with running_service(models, **PATIENT, RAY_OVERRIDE_RESOURCES='{"GPU": 1}') as service:
        with service.client() as client:
            for name in HALVES:
                client.put(f"/x/deployments/{name}", body={"num_gpus": 0.5, "dtype": "float32"}, cast_to=object)
            own = {"dtype": "float32", "max_model_len": 256}  # so that another engine scores
            client.put("/x/deployments/tiny", body=own, cast_to=object)
        yield service


def test_a_job_with_a_served_reference_goes_through_with_chat_between_its_pause_and_its_resumption(
    client: openai.OpenAI,
) -> None:
    assert chat(client, "tiny") > 0
    job_id = submit(client, 200, 20)  # 1000 steps; its reference is scored by an engine of its own
    wait_for_step(client, job_id, 2)
    assert any("The reference's deployment agrees" in message for message in messages(client, job_id))
    client.fine_tuning.jobs.pause(job_id)
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job_id).status == "paused", "paused", seconds=600)
    assert chat(client, "tiny") > 0
    client.fine_tuning.jobs.resume(job_id)
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job_id).status == "running", "it goes on", seconds=600)
    assert chat(client, "tiny") > 0
    assert finished(client, job_id).status == "succeeded", messages(client, job_id)
