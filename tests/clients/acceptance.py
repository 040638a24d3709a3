"""Does what users do with OpenAI's client, once: `acceptance.py MODEL`, with OPENAI_BASE_URL and OPENAI_API_KEY set.

FLAKY_BASE_URL leads to the same service through a proxy that loses the first answer of every other connection. The
program receives the service's webhooks on the port HOOKS_PORT of loopback.
"""

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import openai

ENDED = ("succeeded", "failed", "cancelled")
ASKED: Any = [{"role": "user", "content": "Where do I find a red saw?"}]


def pairs(count: int) -> bytes:
    rows = [
        {
            "input": {"messages": [{"role": "user", "content": f"Where do I find saw {number}?"}]},
            "preferred_output": [{"role": "assistant", "content": f"In aisle {number}, on the left."}],
            "non_preferred_output": [{"role": "assistant", "content": "No idea."}],
        }
        for number in range(count)
    ]
    return "\n".join(map(json.dumps, rows)).encode()


def dpo(**hyperparameters: Any) -> Any:
    return {"type": "dpo", "dpo": {"hyperparameters": {"batch_size": 4, **hyperparameters}}}


def wait_for(look: Callable[[], Any], what: str, seconds: float = 400) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.2)
    raise AssertionError(f"{what}: not within {seconds:.0f} s")


def lacks(part: str) -> None:
    print(f"skipped: openai {openai.__version__} has no {part}")


def refused(kind: type[openai.APIStatusError], call: Callable[[], Any]) -> Any:
    try:
        call()
    except kind as error:
        assert error.request_id
        assert error.message
        return error
    raise AssertionError(f"{kind.__name__} was not raised")


class Receiver(BaseHTTPRequestHandler):
    got: list[tuple[str, dict[str, str]]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        self.got.append((body, dict(self.headers.items())))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        return


def files(client: openai.OpenAI) -> str:
    data = pairs(24)
    file = client.files.create(file=("pairs.jsonl", data), purpose="fine-tune")
    assert client.files.wait_for_processing(file.id, poll_interval=0.1).status == "processed"
    assert client.files.retrieve(file.id).bytes == len(data)
    assert client.files.content(file.id).read() == data
    assert file.id in [found.id for found in client.files.list(purpose="fine-tune", limit=2)]

    hour: Any = {"anchor": "created_at", "seconds": 3600}
    brief = client.files.create(file=("brief.jsonl", data), purpose="fine-tune", expires_after=hour)
    assert brief.expires_at == brief.created_at + 3600
    assert client.files.delete(brief.id).deleted
    refused(openai.NotFoundError, lambda: client.files.retrieve(brief.id))
    return file.id


def uploads(client: openai.OpenAI) -> None:
    data = pairs(40)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.jsonl"
        path.write_bytes(data)
        upload = client.uploads.upload_file_chunked(
            file=path, mime_type="application/jsonl", purpose="fine-tune", part_size=3000
        )
    assert upload.status == "completed"
    assert upload.file
    assert client.files.content(upload.file.id).read() == data
    given_up = client.uploads.create(filename="no.jsonl", bytes=9, mime_type="application/jsonl", purpose="fine-tune")
    assert client.uploads.cancel(given_up.id).status == "cancelled"


def hooks(client: openai.OpenAI, port: int) -> tuple[str, str]:
    """Creates a webhook endpoint, and returns its id and its secret."""
    wanted: Any = {
        "name": "acceptance",
        "url": f"http://127.0.0.1:{port}/hooks",
        "event_types": ["fine_tuning.job.succeeded"],
    }
    if not hasattr(client.webhooks, "create"):
        lacks("webhooks.create")
        made: Any = client.post("/webhook_endpoints", body=wanted, cast_to=object)
        return made["id"], made["signing_secret"]
    endpoint = client.webhooks.create(**wanted)
    assert endpoint.id in [found.id for found in client.webhooks.list(limit=1)]
    assert client.webhooks.retrieve(endpoint.id).name == "acceptance"
    assert client.webhooks.update(endpoint.id, name="renamed").name == "renamed"
    rotated = client.webhooks.rotate_secret(endpoint.id)
    assert rotated.signing_secret != endpoint.signing_secret
    assert client.webhooks.test(endpoint.id, event_type="fine_tuning.job.succeeded").status_code == 200
    return endpoint.id, rotated.signing_secret


def told(client: openai.OpenAI, job_id: str, secret: str) -> None:
    """Waits for the signed webhook about the end of the job."""

    def came() -> bool:
        for body, headers in Receiver.got:
            event: Any = client.webhooks.unwrap(body, headers, secret=secret)
            if event.type == "fine_tuning.job.succeeded" and event.data.id == job_id:
                return True
        return False

    wait_for(came, "the webhook")
    body, headers = Receiver.got[-1]
    try:
        client.webhooks.unwrap(body + " ", headers, secret=secret)
    except openai.InvalidWebhookSignatureError:
        return
    raise AssertionError("a changed body was taken")


def succeeded(client: openai.OpenAI, model: str, file_id: str) -> Any:
    job = client.fine_tuning.jobs.create(
        model=model, training_file=file_id, method=dpo(beta=0.1), seed=7, suffix="round", metadata={"team": "shop"}
    )
    assert (job.error, job.fine_tuned_model, job.finished_at) == (None, None, None)
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job.id).status in ENDED, f"{job.id} ends")
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
    assert (job.seed, job.error, job.metadata) == (7, None, {"team": "shop"})
    assert job.trained_tokens
    assert job.finished_at
    assert job.method
    assert job.method.dpo
    assert job.method.dpo.hyperparameters
    assert (job.method.dpo.hyperparameters.beta, job.method.dpo.hyperparameters.batch_size) == (0.1, 4)
    return job


def lists(client: openai.OpenAI, job: Any) -> str:
    """Checks the lists of jobs, events and checkpoints. Returns the model name of a checkpoint before the last."""
    assert job.id in [found.id for found in client.fine_tuning.jobs.list(limit=1)]  # one page for each job
    assert job.id in [found.id for found in client.fine_tuning.jobs.list(metadata={"team": "shop"})]
    assert job.id not in [found.id for found in client.fine_tuning.jobs.list(metadata={"team": "other"})]

    events = list(client.fine_tuning.jobs.list_events(job.id, limit=4))
    assert len({event.id for event in events}) == len(events) > 4
    steps: list[Any] = [event.data for event in events if event.type == "metrics"]
    assert all(data["train_loss"] >= 0 for data in steps)
    rows = client.files.content(job.result_files[0]).text.splitlines()
    assert rows[0].startswith("step,train_loss")
    assert [int(row.split(",")[0]) for row in rows[1:]] == [data["step"] for data in steps][::-1]

    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    assert {checkpoint.fine_tuning_job_id for checkpoint in checkpoints} == {job.id}
    assert checkpoints[-1].metrics.train_loss is not None
    oldest = checkpoints[-1]
    assert oldest.fine_tuned_model_checkpoint.endswith(f":ckpt-step-{oldest.step_number}")
    return oldest.fine_tuned_model_checkpoint


def asked(client: openai.OpenAI, policy: str, checkpoint: str) -> None:
    for name in (policy, checkpoint):
        assert client.models.retrieve(name).id == name
        answer = client.chat.completions.create(model=name, messages=ASKED, max_tokens=8, temperature=0)
        assert answer.model == name
        assert answer.usage
        assert answer.usage.completion_tokens > 0
    assert {policy, checkpoint} <= {model.id for model in client.models.list()}
    plain = client.chat.completions.create(model=policy, messages=ASKED, max_tokens=8, temperature=0)
    chunks = client.chat.completions.create(model=policy, messages=ASKED, max_tokens=8, temperature=0, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == (plain.choices[0].message.content or "")
    assert client.completions.create(model=policy, prompt="Where", max_tokens=4).choices[0].finish_reason


def wishes(client: openai.OpenAI, model: str, file_id: str) -> None:
    """Pauses, resumes and cancels a job."""
    jobs = client.fine_tuning.jobs
    job = jobs.create(model=model, training_file=file_id, method=dpo(n_epochs=50, batch_size=1))
    wait_for(lambda: any(event.type == "metrics" for event in jobs.list_events(job.id)), "the first step")
    if hasattr(jobs, "pause"):
        jobs.pause(job.id)
        wait_for(lambda: str(jobs.retrieve(job.id).status) == "paused", "the pause")
        assert jobs.resume(job.id).status == "queued"
    else:
        lacks("jobs.pause")
    jobs.cancel(job.id)
    wait_for(lambda: jobs.retrieve(job.id).status == "cancelled", "the end")
    again = refused(openai.BadRequestError, lambda: jobs.cancel(job.id))
    assert "cancelled" in again.message


def errors(client: openai.OpenAI, model: str, file_id: str) -> None:
    stranger = client.with_options(api_key="sk-nobody")
    assert refused(openai.AuthenticationError, stranger.models.list).code == "invalid_api_key"
    assert refused(openai.NotFoundError, lambda: client.models.retrieve("absent")).code == "model_not_found"
    jobs = client.fine_tuning.jobs
    body: Any = {"model": model, "training_file": file_id}
    strange = refused(openai.BadRequestError, lambda: jobs.create(**body, method=dpo(bta=1)))
    assert (strange.param, strange.code) == ("method.dpo.hyperparameters.bta", "unknown_parameter")
    wrong = refused(openai.BadRequestError, lambda: jobs.create(**body, method=dpo(beta=-1)))
    assert (wrong.param, wrong.type) == ("method.dpo.hyperparameters.beta", "invalid_request_error")
    create = client.files.create
    row = refused(openai.BadRequestError, lambda: create(file=("bad.jsonl", b"[1]\n"), purpose="fine-tune"))
    assert "Line 1 is not a dictionary" in row.message


def raw(client: openai.OpenAI) -> None:
    answer = client.fine_tuning.jobs.with_raw_response.list(limit=1)
    assert answer.headers["x-request-id"]
    assert answer.parse().data
    with client.models.with_streaming_response.list() as streamed:
        assert streamed.status_code == 200


async def at_once(model: str, file_id: str) -> None:
    async with openai.AsyncOpenAI() as client:
        jobs = client.fine_tuning.jobs
        made = await asyncio.gather(
            *(jobs.create(model=model, training_file=file_id, method=dpo(), suffix=f"n{i}") for i in range(3))
        )
        await asyncio.gather(*(jobs.cancel(job.id) for job in made))
        assert {job.id for job in made} < {job.id async for job in jobs.list(limit=2)}
        found = await client.files.content(file_id)
        assert found.read() == pairs(24)


def resent(client: openai.OpenAI, flaky_url: str, model: str) -> None:
    """Checks that everything is created once, although each answer is lost once and the client sends its request
    again."""
    with openai.OpenAI(base_url=flaky_url) as flaky:
        before = [file.id for file in client.files.list()]
        file = flaky.files.create(file=("resent.jsonl", pairs(12)), purpose="fine-tune")
        assert [found.id for found in client.files.list()] == [file.id, *before]
    with openai.OpenAI(base_url=flaky_url) as flaky:
        jobs = [job.id for job in client.fine_tuning.jobs.list()]
        job = flaky.fine_tuning.jobs.create(model=model, training_file=file.id, method=dpo())
        assert [found.id for found in client.fine_tuning.jobs.list()] == [job.id, *jobs]
    client.fine_tuning.jobs.cancel(job.id)


def deleted(client: openai.OpenAI, policy: str) -> None:
    assert client.models.delete(policy).deleted
    refused(openai.NotFoundError, lambda: client.models.retrieve(policy))
    refused(openai.NotFoundError, lambda: client.chat.completions.create(model=policy, messages=ASKED))


def main(model: str) -> None:
    port = int(os.environ["HOOKS_PORT"])
    Receiver.got = []
    receiver = HTTPServer(("127.0.0.1", port), Receiver)
    Thread(target=receiver.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    with openai.OpenAI() as client:
        file_id = files(client)
        uploads(client)
        endpoint, secret = hooks(client, port)
        job = succeeded(client, model, file_id)
        told(client, job.id, secret)
        client.delete(f"/webhook_endpoints/{endpoint}", cast_to=object)
        checkpoint = lists(client, job)
        asked(client, job.fine_tuned_model, checkpoint)
        wishes(client, model, file_id)
        errors(client, model, file_id)
        raw(client)
        asyncio.run(at_once(model, file_id))
        resent(client, os.environ["FLAKY_BASE_URL"], model)
        deleted(client, job.fine_tuned_model)
    print(f"openai {openai.__version__}: all passed")


if __name__ == "__main__":
    main(sys.argv[1])
