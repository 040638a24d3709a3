"""Ray over HTTP: its Jobs API runs attempts, its Serve API runs models. The control plane imports no ray."""

import asyncio
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx

from services.contract import Deployment, storable
from services.control_plane.settings import Settings

AttemptStatus = Literal["pending", "running", "ended", "absent", "unknown"]

LIVE: dict[str, AttemptStatus] = {"PENDING": "pending", "RUNNING": "running"}
SERVE_PORT = 8000  # Ray's own default
LOOPBACK = ("127.0.0.1", "localhost", "::1")
STOP_SECONDS = 30  # from SIGTERM to SIGKILL: an attempt leaves a checkpoint
TRANSIENT = (408, 425, 429)  # of the 4xx those that say: later
VIEW_SECONDS = 0.5  # requests that wait for a model share one look at Serve


@dataclass(frozen=True)
class Application:
    """A Serve application as Serve reports it."""

    state: Literal["loading", "running", "failed", "stopping"]
    message: str


@dataclass(frozen=True)
class ServeView:
    """One look at Ray Serve."""

    applications: dict[str, Application]
    base_url: str | None  # of its HTTP proxy; None while Serve is not up
    seen_at: float


class Refused(Exception):
    """Ray refuses a launch for good; the message has its words."""


class Launcher:
    """Every call may fail with httpx.HTTPError, which means: nothing is known, so change nothing."""

    def __init__(self, settings: Settings) -> None:
        token = settings.ray_token
        headers = {"Authorization": f"Bearer {token.get_secret_value()}"} if token else {}
        self._ray = httpx.AsyncClient(
            base_url=settings.ray_url, headers=headers, timeout=10, event_hooks={"response": [_check_json]}
        )
        self._settings = settings
        self._view: ServeView | None = None
        self._looking = asyncio.Lock()

    async def close(self) -> None:
        await self._ray.aclose()

    # --- attempts ---------------------------------------------------------------------------

    async def submit(self, submission_id: str, spec_uri: str, token: str) -> None:
        """Launch an attempt. Ray refuses a second submission of one id, so this acts at most once.

        Raises Refused where Ray would refuse it again.
        """
        # Ray's supervisor of the job reads the second, and so does the driver.
        environment = {"RAYDPO_ATTEMPT_TOKEN": token, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
        await self._submit(submission_id, "services.training.driver", spec_uri, environment)

    async def submit_check(self, submission_id: str, request_uri: str) -> None:
        """Launch the check of a training file, likewise."""
        await self._submit(submission_id, "services.training.checking", request_uri, {})

    async def _submit(self, submission_id: str, program: str, uri: str, environment: dict[str, str]) -> None:
        body = {
            "entrypoint": f"exec python -m services.forkserver.client --wait -m {program} {shlex.quote(uri)}",
            "submission_id": submission_id,
            "runtime_env": {"env_vars": environment},
        }
        # Ray sets up the driver's environment before it answers.
        answer = await self._ray.post("/api/jobs/", json=body, timeout=60)
        if answer.is_error and "already exists" in answer.text:
            return  # an earlier launch, whose answer was lost
        if answer.is_client_error and answer.status_code not in TRANSIENT:
            raise Refused(rays_words(answer.text))
        answer.raise_for_status()

    async def status(self, submission_id: str) -> AttemptStatus:
        """`absent` only on Ray's own word that it does not know the id; any doubt is `unknown`."""
        try:
            answer = await self._ray.get(f"/api/jobs/{submission_id}")
        except httpx.HTTPError:
            return "unknown"
        if answer.status_code == 404 and "does not exist" in answer.text:
            return "absent"
        if answer.status_code != 200:
            return "unknown"
        return LIVE.get(answer.json()["status"], "ended")

    async def stop(self, submission_id: str) -> None:
        """Ask Ray to stop the attempt: SIGTERM, then SIGKILL."""
        (await self._ray.post(f"/api/jobs/{submission_id}/stop")).raise_for_status()

    async def live_submissions(self) -> list[str]:
        """The submission ids of all that runs, or waits to."""
        answer = await self._ray.get("/api/jobs/")
        answer.raise_for_status()
        return [job["submission_id"] for job in answer.json() if job["status"] in LIVE and job["submission_id"]]

    async def capacity(self) -> dict[str, float]:
        """What the cluster has of each resource, or may grow to. Empty where Ray does not say."""
        try:
            nodes = (await self._ray.get("/api/v0/nodes")).raise_for_status().json()["data"]["result"]["result"]
        except (httpx.HTTPError, KeyError, TypeError):
            return {}
        there = {str(name): amount for name, amount in self._settings.max_cluster.items()}
        for name in ("CPU", "GPU"):
            total = sum(node["resources_total"].get(name, 0) for node in nodes if node["state"] == "ALIVE")
            there[name] = max(total, there.get(name, 0))
        return there

    # --- models -----------------------------------------------------------------------------

    async def serve(self, deployments: Sequence[Deployment]) -> None:
        """Make these, and no others, the running applications. Unchanged ones are left alone by Serve."""
        applications = [
            {
                "name": deployment.app_name,
                "route_prefix": f"/{deployment.app_name}",
                "import_path": "services.serving.app:build",
                "args": deployment.model_dump(mode="json"),
            }
            for deployment in deployments
        ]
        body = {
            "applications": applications,
            "proxy_location": "HeadOnly",
            "http_options": self._http_options(),
        }
        answer = await self._ray.put("/api/serve/applications/", json=body, timeout=60)
        answer.raise_for_status()
        self._view = None

    async def is_reachable(self) -> bool:
        """Whether Ray answers. Nothing is launched into the dark: what may run there cannot be cancelled either."""
        try:
            await self.look()
        except httpx.HTTPError:
            return False
        return True

    async def look(self) -> ServeView:
        """Serve's applications, at most half a second old."""
        async with self._looking:
            if self._view is None or time.monotonic() - self._view.seen_at > VIEW_SECONDS:
                answer = await self._ray.get("/api/serve/applications/")
                answer.raise_for_status()
                self._view = self._read(answer.json())
            return self._view

    def _http_options(self) -> dict[str, Any]:
        """Where Serve listens if it has to be started: on loopback if Ray does."""
        url = urlsplit(self._settings.serve_url or self._settings.ray_url)
        host = "127.0.0.1" if url.hostname in LOOPBACK else "0.0.0.0"
        return {"host": host, "port": url.port if self._settings.serve_url else SERVE_PORT}

    def _read(self, status: dict[str, Any]) -> ServeView:
        applications = {name: _application(app) for name, app in status["applications"].items()}
        base_url = self._settings.serve_url
        http = status.get("http_options") or {}
        if base_url is None and http.get("port"):
            base_url = f"http://{urlsplit(self._settings.ray_url).hostname}:{http['port']}"
        return ServeView(applications, base_url, time.monotonic())


async def _check_json(answer: httpx.Response) -> None:
    """A page that a proxy shows in Ray's place tells nothing of Ray."""
    if answer.request.method == "GET" and answer.is_success:
        await answer.aread()
        try:
            answer.json()
        except ValueError:
            raise httpx.DecodingError("What answers in Ray's place sends no JSON.", request=answer.request) from None


def _application(app: dict[str, Any]) -> Application:
    states: dict[str, Literal["loading", "running", "failed", "stopping"]] = {
        "RUNNING": "running",
        "DEPLOY_FAILED": "failed",
        "DELETING": "stopping",
    }
    messages = [deployment.get("message", "") for deployment in app.get("deployments", {}).values()]
    return Application(states.get(app["status"], "loading"), rays_words("\n".join([app.get("message", ""), *messages])))


def rays_words(message: str) -> str:
    """What a user can act on of Ray's message: the last error that its tracebacks name."""
    errors = [line for line in message.splitlines() if re.match(r"[\w.]*(Error|Exception): ", line)]
    return storable(errors[-1] if errors else message.strip()[-300:])
