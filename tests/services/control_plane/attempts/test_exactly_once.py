"""Tests that the reports of an attempt (one run of a job) are recorded once and without a gap.

This holds even if the service dies before it answers.
"""

import asyncio
import os
import time
from itertools import count
from pathlib import Path

import openai
import pytest

from dpo_core.config import TrainConfig
from services.contract import AttemptSpec, StepMetrics
from services.control_plane.attempts import attempts
from services.control_plane.core.store import Store
from services.control_plane.settings import Settings
from services.training.reports import reporting
from services.training.reports.reporting import Reporter
from tests.services.control_plane.conftest import free_port, pairs
from tests.services.forks import Fork

PROGRAM = """
import os
from services.control_plane.app import create_app
from services.control_plane.http.server import Server
from services.control_plane.settings import Settings

class Mortal:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def die_before_the_answer(message):
            os._exit(9)
        dies = os.environ["DIES"] and scope.get("path", "").startswith("/internal")
        await self.app(scope, receive, die_before_the_answer if dies else send)

app = create_app(Settings())
app.add_middleware(Mortal)
Server(app, host="127.0.0.1", port=int(os.environ["PORT"]), log_level="warning").run()
"""
DEATHS = 2


def serve(settings: Settings, port: int, *, dies: bool) -> Fork:
    environment = os.environ | {
        "PORT": str(port),
        "DIES": "yes" if dies else "",
        "DATABASE_URL": settings.database_url,
        "RAYDPO_HOME": str(settings.home),
        "RAYDPO_STORAGE_URL": settings.storage_url,
        "RAYDPO_API_KEY": settings.api_key.get_secret_value(),
        "RAYDPO_ADVERTISED_URL": settings.advertised_url,
        "RAYDPO_RAY_URL": settings.ray_url,
    }
    return Fork(PROGRAM, env=environment)


async def open_attempt(settings: Settings, job_id: str) -> str:
    store = Store(settings.database_url)
    async with store.begin() as session:
        attempt = await attempts.begin(session, job_id, 1, None, num_accelerators=0)
        token = await attempts.give_token(session, attempt)
    await store.close()
    return token


@pytest.mark.slow
def test_reports_are_recorded_once_though_the_service_dies_before_it_answers(
    client: openai.OpenAI, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "LAST_RETRY_SECONDS", 0.5)
    file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    job_id = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method={"type": "dpo"}).id
    token, port = asyncio.run(open_attempt(settings, job_id)), free_port()
    spec = AttemptSpec(
        job_id=job_id,
        attempt=1,
        config=TrainConfig(),
        num_workers=1,
        training_uri=(tmp_path / "rows").as_uri(),
        model_source="/nowhere",
        run_uri=(tmp_path / "run").as_uri(),
        cache_uri=(tmp_path / "cache").as_uri(),
        events_url=f"http://127.0.0.1:{port}/internal/attempts/{job_id}/1/events",
    )
    reporter, steps = Reporter(spec, token, period_seconds=0.05), count(1)

    def report() -> None:
        reporter.report(StepMetrics(step=next(steps), total_steps=1000, metrics={"loss": 0.5}))

    for _ in range(DEATHS):
        service = serve(settings, port, dies=True)
        while service.poll() is None:
            report()
            time.sleep(0.1)
        assert service.returncode == 9
    service = serve(settings, port, dies=False)
    try:
        for _ in range(5):
            report()
        assert reporter.close(300)
    finally:
        service.terminate()
        service.wait()
    events = client.fine_tuning.jobs.list_events(job_id, limit=100)
    found = [event.data["step"] for event in events if event.type == "metrics"]  # type: ignore[index]
    assert found[::-1] == list(range(1, next(steps)))
