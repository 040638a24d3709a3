"""Tests how engines and jobs take turns on one GPU. Ray is told of a GPU that does not exist; engines run on CPUs."""

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.e2e.conftest import Service, running_service, tiny_model, wait_for
from tests.e2e.test_service import finished, messages, shop_pairs, wait_for_step

pytestmark = [pytest.mark.e2e, pytest.mark.ray]

PATIENT = {"RAYDPO_MODEL_WAIT_SECONDS": "900", "RAYDPO_NUM_GPUS_PER_MODEL": "1"}


def submit(client: openai.OpenAI, count: int, epochs: int, **options: Any) -> str:
    """Submits a DPO job whose reference a vLLM engine must score, and returns the job's id."""
    file = client.files.create(file=("pairs.jsonl", shop_pairs(count)), purpose="fine-tune")
    own = {"reference": {"source": "serve"}, "adapter": "none"} | options
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
    return {"tiny": tiny_model(folder / "tiny")}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """Starts a service whose GPU has room for either the model `tiny` or the engine that scores with it."""
    with running_service(models, **PATIENT, RAY_OVERRIDE_RESOURCES='{"GPU": 1}') as service:
        with service.client() as client:
            own = {"dtype": "float32", "max_model_len": 256}  # so that another engine scores
            client.put("/x/deployments/tiny", body=own, cast_to=object)
        yield service


def test_a_job_with_a_served_reference_goes_through_with_chat_between_its_pause_and_its_resumption(
    client: openai.OpenAI,
) -> None:
    assert chat(client, "tiny") > 0
    job_id = submit(client, 200, 20)  # 1000 steps; its reference is scored by an engine of its own
    wait_for_step(client, job_id, 2)
    assert any(
        "vLLM and the trainer compute the same log-probabilities" in message for message in messages(client, job_id)
    )
    client.fine_tuning.jobs.pause(job_id)
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job_id).status == "paused", "paused", seconds=600)
    assert chat(client, "tiny") > 0
    client.fine_tuning.jobs.resume(job_id)
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job_id).status == "running", "it goes on", seconds=600)
    assert chat(client, "tiny") > 0
    assert finished(client, job_id).status == "succeeded", messages(client, job_id)


@pytest.mark.long
def test_three_models_that_are_asked_at_once_and_in_turn_all_answer_on_two_gpus() -> None:
    names = ("first", "second", "third")
    two = {"RAY_OVERRIDE_RESOURCES": '{"GPU": 2}', "RAYDPO_MAX_LOADED_MODELS": "2"}
    with (
        running_service(
            lambda folder: {name: tiny_model(folder / name) for name in names}, **PATIENT, **two
        ) as service,
        service.client() as client,
        ThreadPoolExecutor(len(names)) as threads,
    ):
        answers = [threads.submit(chat, client, name) for name in names]
        wait_for(lambda: "another model to be idle: 2 of at most 2 models are loaded" in str(waits(client)), "it waits")
        assert all(answer.result() > 0 for answer in answers)
        for name in names:
            assert chat(client, name) > 0
        assert len(service.processes("ray::ServeReplica")) <= 2


def waits(client: openai.OpenAI) -> list[str | None]:
    """Returns what each model waits for, as its deployment says."""
    deployments: Any = client.get("/x/deployments", cast_to=object)
    return [each["waits_for"] for each in deployments["data"]]


@pytest.mark.parametrize("seconds", [20, pytest.param(360, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("stage", "cluster", "options"),
    [
        ("loading reference", {"RAYDPO_MAX_CLUSTER": '{"GPU": 1}'}, {}),
        (
            "waiting for workers",
            {"RAYDPO_MAX_CLUSTER": '{"CPU": 4}', "RAY_OVERRIDE_RESOURCES": '{"CPU": 2}'},
            {"reference": {"source": "trainer"}, "num_workers": 3},
        ),
    ],
)
def test_a_node_that_appears_late_fails_nothing(
    stage: str, cluster: dict[str, str], options: dict[str, Any], seconds: int
) -> None:
    with running_service(models, **PATIENT | cluster) as service, service.client() as client:
        job_id = submit(client, 40, 1, **options)
        wait_for(lambda: stage_of(client, job_id) == stage, stage, seconds=600)
        time.sleep(seconds)
        assert (client.fine_tuning.jobs.retrieve(job_id).status, stage_of(client, job_id)) == ("running", stage)
        with second_node(service):
            assert finished(client, job_id).status == "succeeded", messages(client, job_id)
        assert not any("Attempt 1 of the job ended" in message for message in messages(client, job_id))


def stage_of(client: openai.OpenAI, job_id: str) -> str | None:
    job = client.get(f"/fine_tuning/jobs/{job_id}", cast_to=dict[str, dict[str, dict[str, str]]])
    return (job["x_raydpo"].get("progress") or {}).get("stage")


NODE = """
import sys, time
from ray._private.node import Node
from ray._private.parameter import RayParams

resources = {"num_cpus": 2, "num_gpus": 1, "object_store_memory": 200_000_000}
Node(RayParams(gcs_address=sys.argv[1], node_ip_address="127.0.0.1", **resources), head=False, spawn_reaper=False)
time.sleep(3600)
"""


@contextmanager
def second_node(service: Service) -> Iterator[None]:
    """Adds a second node, with a GPU that does not exist, to the service's Ray.

    It is started without `ray start`, which allows only one node on loopback.
    """
    (gcs,) = [process for process in service.processes() if process.name() == "gcs_server"]
    (port,) = [word.partition("=")[2] for word in gcs.cmdline() if word.startswith("--gcs_server_port=")]
    node = psutil.Popen([sys.executable, "-c", NODE, f"127.0.0.1:{port}"], env=gcs.environ())
    try:
        yield
    finally:
        started = [*node.children(recursive=True), node]
        for process in started:
            process.terminate()
        psutil.wait_procs(started, timeout=30)
