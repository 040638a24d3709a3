"""Measures two times of a policy in a complete service: from the success of the policy's job to the first answer,
and from the request to delete the policy to the end of the streams that use it.

    python -m benchmarks.service.adapter_life --adapters 5 --streams 20

The base model, a Llama with random weights, is loaded before the first job. When the policy of a job has given its
first answer, clients stream long answers, half of them from the policy and half from the base. Then the policy is
deleted. The benchmark runs on CPUs. With --whole the jobs train all weights, so that each policy has an engine of its
own.
"""

import argparse
import asyncio
import os
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import httpx
import openai

from tests.e2e.conftest import Service, running_service, tiny_model
from tests.e2e.test_service import messages, shop_pairs

POLL_SECONDS = 0.05  # how often the status of a job is read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=5, help="Number of jobs. Default: %(default)s.")
    parser.add_argument("--streams", type=int, default=20, help="Number of streams. Default: %(default)s.")
    parser.add_argument("--hidden-size", type=int, default=512, help="Width of the base. Default: %(default)s.")
    parser.add_argument("--layers", type=int, default=8, help="Layers of the base. Default: %(default)s.")
    parser.add_argument("--whole", action="store_true", help="Train all weights instead of adapters.")
    args = parser.parse_args()
    size = {"hidden_size": args.hidden_size, "num_layers": args.layers}
    with (
        running_service(lambda folder: {"tiny": tiny_model(folder / "tiny", **size)}) as service,
        service.client() as client,
    ):
        client.completions.create(model="tiny", prompt="a", max_tokens=1)
        firsts, deletions, ends = [], [], []
        for _ in range(args.adapters):
            policy = train(client, whole=args.whole)
            began = time.monotonic()
            client.completions.create(model=policy, prompt="a", max_tokens=1)
            firsts.append(time.monotonic() - began)
            deleted, ended = asyncio.run(delete_under_load(service, policy, args.streams))
            deletions.append(deleted)
            ends.append(ended)
            print(f"first answer {firsts[-1]:.2f} s, deleted in {deleted:.2f} s, ended in {ended:.2f} s", flush=True)
    print(f"first answer after its job succeeded: {_times(firsts)}")
    print(f"from the request to delete to its answer: {_times(deletions)}")
    print(f"from the request to delete to the end of the last of {args.streams // 2} streams: {_times(ends)}")
    print(f"load of the machine at the end: {os.getloadavg()[0]:.1f}, cores: {os.cpu_count()}")


def _times(seconds: list[float]) -> str:
    return f"median {median(seconds):.2f} s, longest {max(seconds):.2f} s, of {len(seconds)}"


def train(client: openai.OpenAI, *, whole: bool) -> str:
    """Trains an adapter, or the whole model, in a short job. Returns the name of the job's policy, at most POLL_SECONDS
    after the job has succeeded."""
    file = client.files.create(file=("pairs.jsonl", shop_pairs(20)), purpose="fine-tune")
    options: Any = {"n_epochs": 1, "batch_size": 10, "learning_rate": 1e-3}
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        method={"type": "dpo", "dpo": {"hyperparameters": options}},
        extra_body={"x_raydpo": {"reference": {"source": "trainer"}} | ({"adapter": "none"} if whole else {})},
    )
    while not (job := client.fine_tuning.jobs.retrieve(job.id)).finished_at:
        time.sleep(POLL_SECONDS)
    assert job.fine_tuned_model, messages(client, job.id)
    return job.fine_tuned_model


@dataclass
class Stream:
    """A streamed answer of one model: whether it has begun, when it ended, and its last bytes."""

    model: str
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    ended_at: float = 0.0
    last: bytes = b""

    async def read(self, client: httpx.AsyncClient) -> None:
        body = {"model": self.model, "prompt": "a", "max_tokens": 1900, "stream": True, "ignore_eos": True}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            async for piece in answer.aiter_raw():
                self.begun.set()
                self.last = self.last[-1000:] + piece
        self.ended_at = time.monotonic()


async def delete_under_load(service: Service, policy: str, num_streams: int) -> tuple[float, float]:
    """Deletes the policy while half of `num_streams` streams come from it. Returns the seconds from the request to
    delete the policy to its answer, and to the end of the policy's last stream."""
    streams = [Stream(policy if number % 2 else "tiny") for number in range(num_streams)]
    headers = {"Authorization": f"Bearer {service.key}"}
    async with httpx.AsyncClient(base_url=service.url, headers=headers, timeout=300) as client:
        tasks = {stream.model: [] for stream in streams}
        for stream in streams:
            tasks[stream.model].append(asyncio.create_task(stream.read(client)))
        await asyncio.gather(*(stream.begun.wait() for stream in streams))
        began = time.monotonic()
        (await client.delete(f"/v1/models/{policy}")).raise_for_status()
        deleted = time.monotonic() - began
        await asyncio.gather(*tasks[policy])
        for task in tasks["tiny"]:
            task.cancel()
        await asyncio.gather(*tasks["tiny"], return_exceptions=True)
    ended = [stream for stream in streams if stream.model == policy]
    assert all(b"model_not_found" in stream.last for stream in ended), [stream.last for stream in ended]
    return deleted, max(stream.ended_at for stream in ended) - began


if __name__ == "__main__":
    main()
