"""Tests what the route /metrics tells."""

import asyncio

import httpx
import openai
from prometheus_client import generate_latest

from services.control_plane.core import telemetry
from services.control_plane.core.store import Store
from services.control_plane.http import metrics
from tests.services.control_plane.conftest import API_KEY, free_port, pairs


def test_no_label_holds_what_is_anybodys(client: openai.OpenAI, base_url: str) -> None:
    file = client.files.create(file=("secret-name.jsonl", pairs()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method={"type": "dpo"})
    client.fine_tuning.jobs.cancel(job.id)
    httpx.get(f"{base_url}/no/such/{job.id}?key={API_KEY}", trust_env=False)
    text = httpx.get(f"{base_url}/metrics", trust_env=False).text
    for canary in (job.id, file.id, "secret-name", "tiny", API_KEY, "key_configured", "/no/such"):
        assert canary not in text


def test_without_a_database_its_gauges_have_no_values_rather_than_old_ones() -> None:
    async def count() -> None:
        store = Store(f"postgresql://nobody@127.0.0.1:{free_port()}/none")
        try:
            await metrics._count(store)
        finally:
            await store.close()

    telemetry.JOBS.labels("queued").set(3)
    telemetry.OUTBOX.set(3)
    asyncio.run(count())
    told = generate_latest().decode().splitlines()
    assert "raydpo_outbox_messages NaN" in told
    assert not [line for line in told if line.startswith("raydpo_jobs{")]
