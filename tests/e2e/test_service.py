"""Tests the promises of the whole service with real parts: PostgreSQL, Ray Data, Ray Train, and Ray Serve with vLLM.

The tests share one service and run in this order; each leaves it running.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from demo.rows import Shop
from services.training.data import cache
from services.training.preparation import engine_rate_uri
from services.training.reference import rates
from services.training.reference.rates import Rate
from tests.clients import installed
from tests.clients.programs import Address, FlakyProxy, has_node, run_node, run_python
from tests.e2e.conftest import Service, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.ray]

REAL_PAIRS = Path(__file__).parents[3] / "shared" / "data" / "pairs.openai.jsonl"
LONG = {"n_epochs": 8, "batch_size": 4, "learning_rate": 1e-4}  # of 60 pairs: 120 steps


def shop_pairs(count: int) -> bytes:
    shop = Shop(num_things=8, num_held_out=8)
    rows = [
        {
            "input": {"messages": [{"role": "user", "content": prompt}]},
            "preferred_output": [{"role": "assistant", "content": chosen}],
            "non_preferred_output": [{"role": "assistant", "content": rejected}],
        }
        for prompt, chosen, rejected in shop.pairs(count)
    ]
    return "\n".join(map(json.dumps, rows)).encode()


def submit(client: openai.OpenAI, data: bytes, *, workers: int = 1, every: int = 10, **hyperparameters: Any) -> str:
    file = client.files.create(file=("pairs.jsonl", data), purpose="fine-tune")
    assert client.files.wait_for_processing(file.id).status == "processed"
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        method={"type": "dpo", "dpo": {"hyperparameters": hyperparameters}},  # type: ignore[typeddict-item]
        seed=1,
        extra_body={"x_raydpo": {"num_workers": workers, "checkpoint_steps": every}},
    )
    return job.id


def finished(client: openai.OpenAI, job_id: str) -> Any:
    def look() -> Any:
        job = client.fine_tuning.jobs.retrieve(job_id)
        return job if job.status in ("succeeded", "failed", "cancelled") else None

    return wait_for(look, f"{job_id} ends", seconds=1500)


def messages(client: openai.OpenAI, job_id: str) -> list[str]:
    """Returns the messages of the job's events, the oldest first."""
    return [event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=100)][::-1]


def steps(client: openai.OpenAI, job_id: str) -> list[int]:
    events = client.fine_tuning.jobs.list_events(job_id, limit=100)
    return [int(event.data["step"]) for event in events if event.type == "metrics"][::-1]  # type: ignore[index]


def wait_for_step(client: openai.OpenAI, job_id: str, step: int) -> None:
    def reached() -> bool:
        assert client.fine_tuning.jobs.retrieve(job_id).status in ("queued", "running"), messages(client, job_id)
        return any(done >= step for done in steps(client, job_id))

    wait_for(reached, f"step {step}")


def check_usage(client: openai.OpenAI, policy: str, answers: list[Any]) -> None:
    """Waits until the usage of these answers is written, and asserts that all their tokens are counted."""

    def counted() -> Any:
        found: Any = client.get("/x/usage?group_by=model", cast_to=object)
        return next((each for each in found["data"] if each["id"] == policy), None)

    sums = wait_for(lambda: (found := counted()) and found["num_requests"] == len(answers) and found, "usage")
    assert sums["prompt_tokens"] == sum(each.prompt_tokens for each in answers)
    assert sums["completion_tokens"] == sum(each.completion_tokens for each in answers)


# What a user runs elsewhere: transformers and peft, without this project. Prints the ids of a prompt with those of the
# answer, for the base, for the adapter on it, and for the merged model.
ELSEWHERE = """
import json, sys
from importlib.util import find_spec
packages, base, adapter, merged, messages = sys.argv[1:]
sys.path.append(packages)  # without its .pth files, one of which leads to this project
assert find_spec("services") is None and find_spec("dpo_core") is None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
adapted = PeftModel.from_pretrained(load(base), adapter)
for folder, model in ((base, load(base)), (adapter, adapted), (merged, load(merged))):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = json.loads(messages)
    ids = tokenizer.apply_chat_template(given, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompt, tokens = ids["input_ids"][0], model.generate(**ids, max_new_tokens=8, do_sample=False)[0]
    print(json.dumps([prompt.tolist(), tokens[len(prompt):].tolist()]))
"""


def answered_ids(service: Service, model: str, asked: Any) -> list[list[int]]:
    """Returns the token ids of the prompt and of the model's likeliest answer, of eight tokens at most."""
    body = {"model": model, "messages": asked, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
    headers = {"Authorization": f"Bearer {service.key}"}
    answer = httpx.post(f"{service.url}/v1/chat/completions", json=body, headers=headers, timeout=300)
    told = answer.raise_for_status().json()
    return [told["prompt_token_ids"], told["choices"][0]["token_ids"]]


def check_downloads(service: Service, policy: str, asked: Any) -> None:
    """Downloads the adapter and the merged model, and asserts that both answer as the service does, token by token, in
    a process that cannot import this project. Their base model must answer otherwise."""
    folders = {format: service.home.parent / format for format in ("adapter", "merged")}
    environment = os.environ | {"RAYDPO_HOME": str(service.home)}
    for format, folder in folders.items():
        command = [sys.executable, "-c", "from services.cli.app import app; app()", "models", "download", policy]
        done = subprocess.run([*command, folder, "--format", format], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads((folder / "raydpo.json").read_text())["format"] == format
    about = json.loads((folders["merged"] / "raydpo.json").read_text())
    assert about["merge"]["largest_difference"] < 1e-3
    command = [
        sys.executable,
        "-IS",  # ignores PYTHONPATH, the current folder and .pth files
        "-c",
        ELSEWHERE,
        sysconfig.get_path("purelib"),
        str(service.models["tiny"]),
        *map(str, folders.values()),
        json.dumps(asked),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    base, adapter, merged = map(json.loads, done.stdout.splitlines()[-3:])
    assert base == answered_ids(service, "tiny", asked)
    assert adapter == merged == answered_ids(service, policy, asked)
    assert base[1] != merged[1], "the policy answers as its base does, so that nothing was compared"


def test_openai_fine_tuning_round_with_the_unmodified_client(service: Service, client: openai.OpenAI) -> None:
    data = REAL_PAIRS.read_bytes() if REAL_PAIRS.exists() else shop_pairs(300)
    job_id = submit(client, data, workers=2, every=4, n_epochs=1, batch_size=32, learning_rate=1e-2)
    job = finished(client, job_id)
    assert job.status == "succeeded", messages(client, job_id)
    assert (job.error, job.trained_tokens > 0, job.seed) == (None, True, 1)
    assert job.method.dpo.hyperparameters.beta == 0.1

    told = messages(client, job_id)
    assert told[0] == f"Created fine-tuning job: {job_id}"
    assert told[-1] == "The job has successfully completed"
    assert any("ln 2" in message for message in told)
    rows = client.files.content(job.result_files[0]).text.splitlines()
    first = dict(zip(rows[0].split(","), rows[1].split(","), strict=True))
    assert abs(float(first["train_loss"]) - 0.693147) < 1e-3
    assert [int(row.split(",")[0]) for row in rows[1:]] == steps(client, job_id)

    checkpoints = client.fine_tuning.jobs.checkpoints.list(job_id).data
    last = steps(client, job_id)[-1]
    saved = sorted({4, 8, last} & set(range(last + 1)))
    assert [checkpoint.step_number for checkpoint in checkpoints][::-1] == saved[-2:]
    policy = job.fine_tuned_model
    assert policy.startswith("ft:tiny:raydpo::")
    assert client.models.retrieve(policy).id == policy

    asked: Any = [{"role": "user", "content": "Where do I find a red saw?"}]
    plain = client.chat.completions.create(model=policy, messages=asked, max_tokens=8, temperature=0)
    assert plain.model == policy
    assert plain.usage is not None
    assert plain.usage.completion_tokens > 0
    chunks = client.chat.completions.create(
        model=policy, messages=asked, max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    streamed = list(chunks)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
    assert text == (plain.choices[0].message.content or "")
    assert streamed[-1].usage is not None
    silent = list(
        client.chat.completions.create(model=policy, messages=asked, max_tokens=8, temperature=0, stream=True)
    )
    assert all(chunk.choices and chunk.usage is None for chunk in silent)  # its count is for the service alone
    assert "".join(chunk.choices[0].delta.content or "" for chunk in silent) == text
    check_usage(client, policy, [plain.usage, streamed[-1].usage, plain.usage])
    check_downloads(service, policy, asked)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=policy, messages=asked, temperature=-1)
    assert isinstance(refused.value.message, str)
    assert refused.value.type == "invalid_request_error"

    # A checkpoint is a model as well; being the third, it takes the place of the least recently used.
    older = checkpoints[-1].fine_tuned_model_checkpoint
    assert client.completions.create(model=older, prompt="Where", max_tokens=4).model == older

    assert client.models.delete(policy).deleted
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=policy, messages=asked)


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[Address]:
    proxy = FlakyProxy(service.url)
    yield Address(service.url, proxy, service.key, service.hooks_port)
    proxy.close()


@pytest.mark.parametrize(
    "version", [*(pytest.param(older, marks=pytest.mark.long) for older in installed.PYTHON[:-1]), installed.PYTHON[-1]]
)
def test_the_round_of_a_python_client(address: Address, version: str) -> None:
    assert run_python(version, address) == f"openai {version}: all passed"


@pytest.mark.long
@pytest.mark.skipif(not has_node(), reason="node and npm are not installed")
def test_the_round_of_the_node_client(address: Address) -> None:
    assert run_node(address).endswith("all passed")


def test_a_running_job_is_cancelled_and_its_processes_end(service: Service, client: openai.OpenAI) -> None:
    job_id = submit(client, shop_pairs(60), **LONG | {"n_epochs": 50})
    wait_for_step(client, job_id, 1)
    client.fine_tuning.jobs.cancel(job_id)
    assert finished(client, job_id).status == "cancelled"
    wait_for(lambda: not service.processes(job_id), "the driver is gone", seconds=60)


def test_the_token_that_ray_shows_of_a_running_job_is_of_no_use(service: Service, client: openai.OpenAI) -> None:
    job_id = submit(client, shop_pairs(60), **LONG | {"n_epochs": 50})
    wait_for_step(client, job_id, 1)
    with ray_of(service) as ray:
        listed = {job["submission_id"]: job for job in ray.get("/api/jobs/").json()}
    shown = listed[f"{job_id}-1"]["runtime_env"]["env_vars"]["RAYDPO_ATTEMPT_TOKEN"]
    url = f"{service.url}/internal/attempts/{job_id}/1/events"
    answer = httpx.post(url, json={"events": []}, headers={"Authorization": f"Bearer {shown}"})
    assert answer.status_code == 409
    client.fine_tuning.jobs.cancel(job_id)
    assert finished(client, job_id).status == "cancelled"


def ray_of(service: Service) -> httpx.Client:
    """Returns a client of the REST API of the service's Ray cluster, with its token."""
    stack, token = json.loads((service.home / "stack.json").read_text()), (service.home / "ray.token").read_text()
    url = f"http://127.0.0.1:{stack['dashboard_port']}"
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"})


def test_a_job_is_paused_resumed_and_stopped_through_ray_without_losing_a_step(
    service: Service, client: openai.OpenAI
) -> None:
    job_id = submit(client, shop_pairs(200), every=10_000, **LONG | {"n_epochs": 50})  # 2500 steps
    wait_for_step(client, job_id, 5)
    client.fine_tuning.jobs.pause(job_id)
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job_id).status == "paused", "paused", seconds=300)
    wait_for(lambda: not service.processes(job_id), "its processes are gone", seconds=60)
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job_id)
    assert checkpoint.step_number == steps(client, job_id)[-1]

    client.fine_tuning.jobs.resume(job_id)
    wait_for_step(client, job_id, checkpoint.step_number + 5)
    with ray_of(service) as ray:
        assert ray.post(f"/api/jobs/{job_id}-2/stop").is_success

    def resumed() -> list[str]:
        found = [
            re.match("Training resumes from the checkpoint of step ([0-9]+)", message)
            for message in messages(client, job_id)
        ]
        return [match[1] for match in found if match]

    wait_for(lambda: len(resumed()) == 2, "resumed again")
    said = messages(client, job_id)
    assert f"The job is paused after step {resumed()[0]}" in said
    assert f"The service stopped attempt 2 of the job after step {resumed()[1]}" in said
    wait_for_step(client, job_id, int(resumed()[1]) + 1)

    def logs() -> dict[str, Any]:
        return client.get(f"/x/jobs/{job_id}/logs", cast_to=dict[str, Any])

    # What was printed is kept a moment later.
    wait_for(lambda: logs()["sources"] == ["driver", "worker-0"], "both are kept", seconds=300)
    wait_for(
        lambda: any("Started training worker group" in line for line in logs()["data"]), "their lines", seconds=300
    )
    assert logs()["attempts"] == [1, 2, 3]
    client.fine_tuning.jobs.cancel(job_id)
    assert finished(client, job_id).status == "cancelled"
    told = steps(client, job_id)
    assert told == list(range(1, len(told) + 1))


def test_a_killed_control_plane_comes_back_to_its_job(service: Service) -> None:
    with service.client() as client:
        job_id = submit(client, shop_pairs(60), **LONG)
        wait_for_step(client, job_id, 1)
    service.kill()
    service.start()
    with service.client() as client:
        assert finished(client, job_id).status == "succeeded", messages(client, job_id)
        assert steps(client, job_id) == list(range(1, 121))
        assert messages(client, job_id).count("The job has successfully completed") == 1


def test_a_killed_driver_is_followed_by_an_attempt_that_resumes(service: Service, client: openai.OpenAI) -> None:
    job_id = submit(client, shop_pairs(60), **LONG)
    wait_for_step(client, job_id, 15)
    for driver in service.processes(f"runs/{job_id}/attempts/1.json"):
        os.kill(driver.pid, signal.SIGKILL)
    assert finished(client, job_id).status == "succeeded", messages(client, job_id)
    assert steps(client, job_id) == list(range(1, 121))
    resumed = [
        message for message in messages(client, job_id) if message.startswith("Training resumes from the checkpoint")
    ]
    assert len(resumed) == 1
    (over,) = [message for message in messages(client, job_id) if message.startswith("Attempt 1 of the job ended: ")]
    assert over.startswith("Attempt 1 of the job ended: the signal SIGKILL killed its process")


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("which", ["raylet", "gcs_server"])
def test_a_job_waits_for_a_ray_that_died_and_goes_on_when_it_is_back(service: Service, which: str) -> None:
    with service.client() as client:
        job_id = submit(client, shop_pairs(60), **LONG)
        wait_for_step(client, job_id, 15)
        (killed,) = [process for process in service.processes() if process.name() == which]
        killed.kill()
        wait_for(lambda: not service.processes(f"runs/{job_id}/attempts/1.json"), "its driver is gone", seconds=120)
        time.sleep(10)
        assert client.fine_tuning.jobs.retrieve(job_id).status == "running"
    service.kill()
    service.start()
    with service.client() as client:
        assert finished(client, job_id).status == "succeeded", messages(client, job_id)
        assert steps(client, job_id) == list(range(1, 121))
        told = messages(client, job_id)
        assert told.count("Attempt 1 of the job ended: the Ray cluster that it ran on is gone") == 1
        assert len([message for message in told if message.startswith("Training resumes from the checkpoint")]) == 1


def test_a_reference_whose_weights_differ_slightly_is_caught_and_replaced(
    service: Service, client: openai.OpenAI
) -> None:
    """The deployment keeps the weights it has loaded, while the policy is read from files that changed since."""
    client.completions.create(model="tiny", prompt="Where", max_tokens=1)  # loads it
    weights = service.models["tiny"] / "model.safetensors"
    shutil.copy(weights, kept := weights.with_suffix(".kept"))
    torch.manual_seed(0)
    changed = {name: tensor + 0.002 * torch.randn_like(tensor) for name, tensor in load_file(weights).items()}
    save_file(changed, weights, metadata={"format": "pt"})
    digest = cache.model_digest(str(service.models["tiny"]), weights=True)
    known = engine_rate_uri((service.home / "storage" / "prepared" / "proj_default").as_uri(), digest, "float32")
    rates.write(known, Rate(tokens_per_second=1e9))  # so fast that it is asked for few rows, too
    try:
        job_id = submit(client, shop_pairs(60), n_epochs=1)
        assert finished(client, job_id).status == "succeeded", messages(client, job_id)
    finally:
        shutil.move(kept, weights)
    told = messages(client, job_id)
    (departure,) = [message for message in told if "different log-probabilities" in message]
    assert "60 rows" in departure
    assert re.search(r"per token mean \S+, 99th percentile \S+, largest \S+; per pair mean", departure)
    assert any(message.startswith("The first loss is 0.69314") for message in told)


def test_a_second_job_on_the_same_data_prepares_nothing(client: openai.OpenAI) -> None:
    told = []
    for _ in range(2):
        job_id = submit(client, shop_pairs(61), n_epochs=1)
        assert finished(client, job_id).status == "succeeded", messages(client, job_id)
        told.append(messages(client, job_id))
    hits = (
        ("Training file: the token ids are known from an earlier job with the same data and model."),
        ("The reference model's scores of these rows are known from an earlier job."),
    )
    assert not set(hits) & set(told[0])
    assert set(hits) < set(told[1])


def test_after_a_clean_stop_nothing_runs_and_after_a_start_all_is_there(service: Service) -> None:
    with service.client() as client:
        jobs = [job.id for job in client.fine_tuning.jobs.list()]
        files = [file.id for file in client.files.list()]
        job_id = submit(client, shop_pairs(60), **LONG)
        wait_for_step(client, job_id, 1)
    service.stop()
    assert service.process is not None
    assert service.process.returncode == 0
    assert service.processes() == []
    service.start()
    with service.client() as client:
        assert finished(client, job_id).status == "succeeded", messages(client, job_id)
        assert [job.id for job in client.fine_tuning.jobs.list()] == [job_id, *jobs]
        assert set(files) < {file.id for file in client.files.list()}
        assert any(model.id.startswith("ft:") for model in client.models.list())
