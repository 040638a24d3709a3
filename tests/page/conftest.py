"""The page in Debian's chromium, served by a control plane in a process of its own, whose Ray trains nothing."""

import json
import math
import shlex
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page

from services import storage
from services.contract import AttemptSpec, CheckRequest, SideJobResult
from services.control_plane.core.store import migrate
from tests.page.browsing import chromium, tab
from tests.page.engine import Engine
from tests.services.control_plane.attempts.crashes import LivelyRay, Plane
from tests.services.control_plane.conftest import API_KEY, api_of, pairs
from tests.services.headers import SMALL, write_model
from tests.services.web import running

NO_ROWS: dict[str, Any] = {"count": 0, "first": []}
LENGTHS = {"total": 168, "longest": 20, "histogram": {"8": 2, "16": 6, "32": 4}}
CHECKED: dict[str, Any] = {  # what a check of a file with a model finds
    "tokens": {
        "num_rows": 12,
        "num_groups": 12,
        "num_kept": 11,
        "num_held_out": 0,
        "chosen_longer": 9,
        "rejected_longer": 3,
        "invalid": {},
        "unread": {},
        "truncated": {},
        "shortest_too_long": 60,
        "limit": 32,
        "truncation": "drop",
        **dict.fromkeys(("margins", "unasked", "unknown", "unended"), NO_ROWS),
        "special_tokens": {"count": 1, "first": [3]},
        "dropped": {"too_long": {"count": 1, "first": [7], "sentence": "Line 7 has 60 tokens."}},
        "lengths": {"prompt": LENGTHS, "chosen": LENGTHS, "rejected": LENGTHS | {"longest": 9}},
    },
    "preview": [
        {
            "line": 1,
            "dropped": None,
            "prompt": "<|user|>Hi<|assistant|>",
            "chosen": "It is 1.</s>",
            "rejected": "No.</s>",
        },
        {"line": 7, "dropped": "too_long", "prompt": "<b>Why</b>\u202e?", "chosen": "Because.</s>", "rejected": None},
    ],
}


class PageRay(LivelyRay):
    """Its attempts tell the metrics of a DPO job, whose chosen answers become less likely as well."""

    _of_thread = threading.local()  # of an attempt

    def _run(self, submission_id: str, uri: str, token: str) -> None:
        objective = AttemptSpec.model_validate_json(storage.read_bytes(uri)).config.objective
        self._of_thread.pace = getattr(objective, "beta", 0.1) * 5
        super()._run(submission_id, uri, token)

    def metrics(self, step: int) -> dict[str, float]:
        margin, waves = self._of_thread.pace * math.log1p(step / 10), math.sin(step) / 40
        chosen, rejected = -30 - 2 * margin + waves, -32 - 12 * margin + waves
        told = {
            "loss": math.log1p(math.exp(-margin)) * (1 + 4 * waves),
            "rewards/margins": margin + waves,
            "rewards/accuracies": min(1.0, 0.5 + margin / 4),
            "rewards/chosen": (chosen + 30) / 10,
            "rewards/rejected": (rejected + 32) / 10,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "kl": margin / 3,
            "grad_norm": 2 - margin / 3,
            "lr": 1e-5 * (1 - step / 200),
            "tokens_per_second": 2150 + 100 * waves,
            "hfu": 0.31 + waves,
        }
        held_out = {"eval/loss": told["loss"] + 0.05, "eval/rewards/margins": margin - 0.1}
        return told | (held_out if step % 10 == 0 else {})

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Ends each check of a file at once, with the same result for all files."""
        if "services.training.check_program" not in body.get("entrypoint", ""):
            return super().post(path, body)
        request = CheckRequest.model_validate_json(storage.read_bytes(shlex.split(body["entrypoint"])[-1]))
        result = SideJobResult(finished_at=time.time(), report=CHECKED)
        storage.write_bytes(storage.join(request.folder_uri, "report.json"), result.model_dump_json().encode())
        self.jobs[body["submission_id"]] = "SUCCEEDED"
        return 200, {}

    def deploy(self, body: dict[str, Any]) -> None:
        """As Ray Serve does, with a replica that runs for each application."""
        super().deploy(body)
        for app in self.serve.values():
            app["deployments"] = {"model": {"replicas": [{"state": "RUNNING"}]}}


class Service:
    def __init__(self, plane: Plane, ray: PageRay, engine: Engine, storage_url: str) -> None:
        self.plane, self.ray, self.engine, self.url, self.storage_url = plane, ray, engine, plane.url, storage_url

    def logged(self) -> str:
        """Returns all that the service has printed, and its log, which has a line for each request."""
        return self.plane.log.read_text() + self.plane.log.with_name("raydpo.log").read_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A new one for each module: the event loop that Playwright keeps would stand in the way of other tests."""
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def more_settings() -> dict[str, str]:
    """Environment variables of the service that a module of tests needs besides the usual ones."""
    return {}


@pytest.fixture(scope="module")
def service(browser: Browser, database_url: str, more_settings: dict[str, str]) -> Iterator[Service]:
    ray = PageRay(step_seconds=0.05, dying=0, steps=80)
    ray.machines = [{"mem": [16 * 2**30, 8 * 2**30, 0.0, 0], "gpus": []}]
    migrate(database_url)
    with TemporaryDirectory(prefix="raydpo-page-") as folder, running(Engine()) as engine:
        small = write_model(Path(folder) / "small", SMALL)
        settings = {
            "DATABASE_URL": database_url,
            "RAYDPO_API_KEY": API_KEY,
            "RAYDPO_STORAGE_URL": (Path(folder) / "storage").as_uri(),
            "RAYDPO_MODELS": json.dumps({"small": str(small), "polite": "/nowhere/polite"}),
            "RAYDPO_SERVE_URL": engine.url,
            "RAYDPO_MAX_RUNNING_JOBS": "2",
        } | more_settings
        plane = Plane(Path(folder) / "home", settings, f"http://127.0.0.1:{ray.server.server_port}")
        plane.start()
        plane.wait()
        yield Service(plane, ray, engine, settings["RAYDPO_STORAGE_URL"])
        plane.kill()
        ray.server.shutdown()
        ray.server.server_close()


@pytest.fixture
def page(browser: Browser, service: Service) -> Iterator[Page]:
    with tab(browser, service.url) as page:
        yield page


@pytest.fixture(scope="module")
def api(service: Service) -> Iterator[httpx.Client]:
    with api_of(service.url, API_KEY) as api:
        yield api


@pytest.fixture(scope="module")
def file_id(api: httpx.Client) -> str:
    answer = api.post("/files", files={"file": ("pairs.jsonl", pairs())}, data={"purpose": "fine-tune"})
    return str(answer.json()["id"])
