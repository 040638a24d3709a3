"""Calls Ray over HTTP: the Jobs API, which runs attempts and side jobs, and the Serve API, which runs models.

The control plane does not import ray. An attempt is one run of a fine-tuning job on the Ray cluster. A side job is a
short program beside training, such as a check of a file. Each of them is a job in Ray with a submission id.
"""

import asyncio
import logging
import re
import shlex
import signal
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
from pydantic import ValidationError

from services.contract import LOAD_ROUTE, Deployment, storable
from services.control_plane.settings import Settings
from services.deaths import cause_in, killer_in

log = logging.getLogger(__name__)

AttemptStatus = Literal["pending", "running", "ended", "absent", "unknown"]

LIVE: dict[str, AttemptStatus] = {"PENDING": "pending", "RUNNING": "running"}
NEVER_STARTED = ("RUNTIME_ENV_SETUP_FAILURE", "JOB_SUPERVISOR_ACTOR_START_", "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE")
SERVE_API = "/api/serve/applications/"
SERVE_PORT = 8000  # Ray's own default
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANSWER_SECONDS = 8  # shorter than the reconciler's lease, because a tick waits for this answer
STOP_SECONDS = 30  # from SIGTERM to SIGKILL, for an attempt to write a checkpoint
TRANSIENT = (408, 425, 429)  # the 4xx that mean: try again later
MOST_CHARACTERS = 300  # of Ray's message in an error
VIEW_SECONDS = 0.5  # requests within this time share one answer of Ray Serve about its state
NODES_ANSWER_SECONDS = 2  # the submission of a job waits at most this long for Ray's list of machines
LOAD_ANSWER_SECONDS = 2  # a replica that does not report its load within this time is left out
ASKS_PER_REPLICA = 4  # more than one, because Serve's proxy chooses which replica answers
NODES_SECONDS = 10  # submissions within this time share one list of machines


@dataclass(frozen=True)
class Submission:
    """The state of a job in Ray, as Ray reports it: the status and, if the job failed, the reason. The job is an
    attempt (run of a fine-tuning job) or a side job (a short program beside training).
    """

    status: AttemptStatus
    error_type: str | None = None  # how the job failed, in Ray's categories
    exit_code: int | None = None  # of the job's driver; negative: the number of the signal that killed the driver
    message: str = ""  # Ray's message, with the last lines of the driver's log

    def cause(self) -> str:
        """Returns the reason, for the user, why an attempt (one run of a fine-tuning job) ended without reporting how
        it ended."""
        if self.status == "absent":
            return "the Ray cluster that it ran on is gone"
        if self.error_type and self.error_type.startswith(NEVER_STARTED):
            return f"Ray could not start its process: {self.message[:MOST_CHARACTERS]}"
        if number := _signal(self.exit_code):
            kernel = " (the system sends it when memory runs out)" if number is signal.SIGKILL else ""
            return killer_in(self.message) or f"the signal {number.name} killed its process{kernel}"
        code = self.exit_code
        status = f"its process ended with exit status {code}" if code else "its process ended before it was finished"
        return cause_in(self.message) or status


def _signal(exit_code: int | None) -> signal.Signals | None:
    """Returns the signal that ended a process, by the exit status that Python (-9) or a shell (137) reports.

    Returns None if no signal ended the process, or `exit_code` is None.
    """
    if exit_code is None:
        return None
    number = -exit_code if exit_code < 0 else exit_code - 128
    return signal.Signals(number) if number in set(signal.Signals) else None


UNKNOWN = Submission("unknown")


@dataclass(frozen=True)
class Application:
    """The state of an application in Ray Serve, as Ray Serve reports it: whether it runs, how many of its replicas
    answer, and the arguments that it was deployed with.
    """

    state: Literal["loading", "running", "failed", "stopping"]
    message: str
    deployment: Deployment | None = None  # its arguments; None: in a form that this release cannot read
    num_ready: int = 0  # replicas that answer
    num_replicas: int = 0
    deleted_adapters: frozenset[str] = frozenset()  # ids of adapters for which it was told to answer no more


@dataclass(frozen=True)
class ServeView:
    """The state of Ray Serve at one moment: this service's applications, and the URL of Ray Serve's HTTP proxy."""

    applications: dict[str, Application]  # those of this service, by name
    base_url: str | None  # of Serve's HTTP proxy; None while Serve is not up
    seen_at: float  # seconds of the monotonic clock


@dataclass(frozen=True)
class Load:
    """The load of an application in Ray Serve: requests in flight, tokens per second and the time to the first token.
    The vLLM engines of its replicas measure these numbers.
    """

    num_replicas: int  # that answered
    requests_in_flight: int
    tokens_per_second: float  # of answers, in the last minute
    time_to_first_token: float | None  # seconds, the mean of the last minute; None: no answer began


@dataclass(frozen=True)
class Node:
    """A machine of the Ray cluster: the bytes of its memory and of each of its GPUs, as Ray's agent on the machine
    measures them.
    """

    memory: int  # bytes; those of the container, if Ray runs in one
    gpus: tuple[int, ...]  # bytes of each GPU


class Refused(Exception):
    """Raised if Ray refused to launch a job, and would refuse the same launch again. The message is Ray's."""


class RayApi:
    """A client of Ray's HTTP APIs. Its methods may raise httpx.HTTPError. After this error the caller does not know
    what Ray does, and must leave its own records as they are.

    Several services may share a cluster. `instance` returns the id of this service, which is part of the names of its
    applications in Ray. Callers of this class see neither that id nor the applications of other services.
    """

    def __init__(self, settings: Settings, instance: Callable[[], Awaitable[str]]) -> None:
        token = settings.ray_token
        headers = {"Authorization": f"Bearer {token.get_secret_value()}"} if token else {}
        self._ray = httpx.AsyncClient(
            base_url=settings.ray_url, headers=headers, timeout=ANSWER_SECONDS, event_hooks={"response": [_check_json]}
        )
        self._serve = httpx.AsyncClient(timeout=LOAD_ANSWER_SECONDS)
        self._settings, self._instance = settings, instance
        self._view: ServeView | None = None
        self._nodes: tuple[float, list[Node]] | None = None  # the time of the last look, and the machines
        self._looking = asyncio.Lock()

    async def close(self) -> None:
        await self._ray.aclose()
        await self._serve.aclose()

    # --- attempts ---------------------------------------------------------------------------

    async def submit(self, submission_id: str, spec_uri: str, token: str) -> None:
        """Launches an attempt (one run of a fine-tuning job) as a job in Ray.

        `spec_uri` is the file that says what the attempt is to do, and `token` the secret with which it reports. Ray
        accepts a submission id only once, so the attempt starts at most once. Raises Refused if Ray refuses the launch
        for a reason that another try would not change.
        """
        # Ray's job supervisor reads the second variable, and so does the driver.
        environment = {"RAYDPO_ATTEMPT_TOKEN": token, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
        await self._submit(submission_id, "services.training.driver", spec_uri, environment)

    async def submit_side_job(self, submission_id: str, program: str, request_uri: str) -> None:
        """Launches a side job (a program beside training, such as a check of a training file) as a job in Ray.

        `program` is a Python module, and `request_uri` the file with its input. Ray accepts a submission id only once,
        so the program starts at most once. Raises Refused if Ray refuses the launch for a reason that another try
        would not change.
        """
        await self._submit(submission_id, program, request_uri, {})

    async def _submit(self, submission_id: str, program: str, uri: str, environment: dict[str, str]) -> None:
        body = {
            "entrypoint": f"exec python -m services.forkserver.client --wait -m {program} {shlex.quote(uri)}",
            "submission_id": submission_id,
            "runtime_env": {"env_vars": environment},
        }
        # Ray sets up the driver's environment before it answers.
        answer = await self._ray.post("/api/jobs/", json=body, timeout=60)
        if answer.is_error and "already exists" in answer.text:
            return  # an earlier launch succeeded, but its answer was lost
        if answer.is_client_error and answer.status_code not in TRANSIENT:
            raise Refused(rays_words(answer.text))
        answer.raise_for_status()

    async def status(self, submission_id: str) -> AttemptStatus:
        return (await self._submission(submission_id)).status

    async def submissions(self, submission_ids: Sequence[str]) -> dict[str, Submission]:
        """Returns the states of these jobs in Ray, by submission id. Each state is UNKNOWN if Ray does not answer.

        Asks Ray for the list of all jobs, then for each job that is missing in the list.
        """
        if not submission_ids:
            return {}
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                told = {job["submission_id"]: _submission(job) for job in await self._jobs()}
                missing = [each for each in submission_ids if each not in told]
                told |= dict(zip(missing, await asyncio.gather(*map(self._submission, missing)), strict=True))
        except (httpx.HTTPError, TimeoutError):
            return dict.fromkeys(submission_ids, UNKNOWN)
        return told

    async def _submission(self, submission_id: str) -> Submission:
        """Returns the state of one job in Ray.

        The status is `absent` only if Ray says that it does not know the submission id. Without a usable answer the
        status is `unknown`.
        """
        try:
            answer = await self._ray.get(f"/api/jobs/{submission_id}")
        except httpx.HTTPError:
            return UNKNOWN
        if answer.status_code == 404 and "does not exist" in answer.text:
            return Submission("absent")
        return _submission(answer.json()) if answer.status_code == 200 else UNKNOWN

    async def _jobs(self) -> list[dict[str, Any]]:
        """Returns all jobs of the Ray cluster, including those of other services."""
        jobs: list[dict[str, Any]] = (await self._ray.get("/api/jobs/")).raise_for_status().json()
        return jobs

    async def stop(self, submission_id: str) -> None:
        """Asks Ray to stop the job `submission_id`. Ray sends SIGTERM, and SIGKILL if the job still runs STOP_SECONDS
        later."""
        (await self._ray.post(f"/api/jobs/{submission_id}/stop")).raise_for_status()

    async def try_to_stop(self, submission_id: str) -> bool:
        """Asks Ray to stop the job `submission_id`. Returns False if Ray does not accept the request; a later cleanup
        then repeats the request."""
        try:
            await self.stop(submission_id)
        except httpx.HTTPError as error:
            log.warning(
                "Ray did not accept the request to stop its job %s; the service repeats the request later: %s",
                submission_id,
                error,
            )
            return False
        return True

    async def live_submissions(self) -> list[str]:
        """Returns the submission ids of all jobs in Ray that run or wait to run."""
        return [job["submission_id"] for job in await self._jobs() if job["status"] in LIVE and job["submission_id"]]

    async def capacity(self) -> dict[str, float]:
        """Returns the numbers of CPUs and GPUs that the cluster has or may grow to. Returns {} if Ray does not
        answer."""
        try:
            nodes = (await self._ray.get("/api/v0/nodes")).raise_for_status().json()["data"]["result"]["result"]
        except (httpx.HTTPError, KeyError, TypeError):
            return {}
        amounts = {str(name): amount for name, amount in self._settings.max_cluster.items()}
        for name in ("CPU", "GPU"):
            total = sum(node["resources_total"].get(name, 0) for node in nodes if node["state"] == "ALIVE")
            amounts[name] = max(total, amounts.get(name, 0))
        return amounts

    async def nodes(self) -> list[Node]:
        """Returns the machines of the cluster that are alive, as of at most ten seconds ago. Returns [] if Ray does not
        answer."""
        if self._nodes is None or time.monotonic() - self._nodes[0] > NODES_SECONDS:
            self._nodes = time.monotonic(), await self._look_at_nodes()
        return self._nodes[1]

    async def _look_at_nodes(self) -> list[Node]:
        try:
            answer = await self._ray.get("/nodes", params={"view": "summary"}, timeout=NODES_ANSWER_SECONDS)
            told = answer.raise_for_status().json()["data"]["summary"]
            alive = [node for node in told if node["raylet"]["state"] == "ALIVE" and node.get("mem")]
            return [Node(int(node["mem"][0]), tuple(map(_size, node.get("gpus") or ()))) for node in alive]
        except (httpx.HTTPError, LookupError, TypeError):
            return []

    # --- models -----------------------------------------------------------------------------

    async def own_name(self, app_name: str) -> str:
        """Returns the full name in Ray Serve of this service's application `app_name`, which is also the application's
        route."""
        return f"{await self._prefix()}{app_name}"

    async def _prefix(self) -> str:
        return f"raydpo-{await self._instance()}-"

    async def serve(
        self, deployments: Sequence[Deployment], deleted_adapters: Mapping[str, Collection[str]] | None = None
    ) -> None:
        """Makes Ray Serve run exactly the applications in `deployments`, and no other applications of this service.

        `deleted_adapters` maps the names of applications to the ids of deleted adapters. The applications stop
        answering for these adapters, without a restart.

        A PUT to Ray Serve removes every application that an earlier PUT deployed and this one leaves out. Therefore the
        request repeats the applications of other services as they were submitted. Ray Serve leaves unchanged
        applications alone.
        """
        prefix = await self._prefix()
        status = await self._serve_status()
        others = _configs_of_others(status["applications"], prefix)
        body = {
            "applications": [
                *others,
                *(_config(each, prefix, (deleted_adapters or {}).get(each.app_name, ())) for each in deployments),
            ],
            "proxy_location": "HeadOnly",
            "http_options": self._http_options(),
            "target_capacity": status.get("target_capacity"),  # holds for all applications, so the value stays
        }
        answer = await self._ray.put(SERVE_API, json=body, timeout=60)
        answer.raise_for_status()
        self._view = None

    async def look(self) -> ServeView:
        """Returns the state of Ray Serve and of this service's applications in it, at most half a second old."""
        async with self._looking:
            if self._view is None or time.monotonic() - self._view.seen_at > VIEW_SECONDS:
                self._view = self._read(await self._serve_status(), await self._prefix())
            return self._view

    def last_view(self, seconds: float) -> ServeView | None:
        """Returns the state of Ray Serve that `look` saw last, without asking Ray.

        Returns None if `look` saw it more than `seconds` ago, or if `serve` has changed the applications after that.
        """
        return self._view if self._view and time.monotonic() - self._view.seen_at <= seconds else None

    async def load(self, app_name: str) -> Load | None:
        """Returns the load of those replicas of the application `app_name` that answer. Returns None if no replica
        answers, or if Ray does not answer."""
        try:
            view = await self.look()
        except httpx.HTTPError:
            return None
        app = view.applications.get(app_name)
        if app is None or not app.num_ready or view.base_url is None:
            return None
        url = f"{view.base_url}/{await self.own_name(app_name)}{LOAD_ROUTE}"
        asks = 1 if app.num_ready == 1 else ASKS_PER_REPLICA * app.num_ready
        answers = await asyncio.gather(*(self._replica_load(url) for _ in range(asks)))
        told = {answer["replica"]: answer for answer in answers if answer}
        return _sum(list(told.values())) if told else None

    async def _replica_load(self, url: str) -> dict[str, Any] | None:
        try:
            answer: dict[str, Any] = (await self._serve.get(url)).raise_for_status().json()
        except (httpx.HTTPError, ValueError):
            return None
        return answer

    async def _serve_status(self) -> dict[str, Any]:
        answer = await self._ray.get(SERVE_API)
        status: dict[str, Any] = answer.raise_for_status().json()
        return status

    def _http_options(self) -> dict[str, Any]:
        """Returns the host and the port at which Ray Serve is to listen. Ray uses them only if Ray Serve does not run
        yet, so that this service's request starts it.

        If Ray's own address is on loopback, Ray Serve listens only there.
        """
        url = urlsplit(self._settings.serve_url or self._settings.ray_url)
        host = "127.0.0.1" if url.hostname in LOOPBACK else "0.0.0.0"
        return {"host": host, "port": url.port if self._settings.serve_url else SERVE_PORT}

    def _read(self, status: dict[str, Any], prefix: str) -> ServeView:
        ours = {name: app for name, app in status["applications"].items() if name.startswith(prefix)}
        applications = {name.removeprefix(prefix): _application(app, prefix) for name, app in ours.items()}
        base_url = self._settings.serve_url
        http = status.get("http_options") or {}
        if base_url is None and http.get("port"):
            base_url = f"http://{urlsplit(self._settings.ray_url).hostname}:{http['port']}"
        return ServeView(applications, base_url, time.monotonic())


async def _check_json(answer: httpx.Response) -> None:
    """Raises httpx.DecodingError if Ray's answer is not JSON but, for example, the page of a proxy in front of Ray."""
    if answer.request.method == "GET" and answer.is_success:
        await answer.aread()
        try:
            answer.json()
        except ValueError:
            raise httpx.DecodingError(
                "The answer from Ray's address is not JSON; another program may listen there.", request=answer.request
            ) from None


def _sum(replicas: Sequence[dict[str, Any]]) -> Load:
    first = sum(replica["first_tokens"] for replica in replicas)
    return Load(
        len(replicas),
        sum(replica["requests_running"] + replica["requests_waiting"] for replica in replicas),
        sum(replica["tokens"] / max(replica["seconds"], 1.0) for replica in replicas),
        sum(replica["first_token_seconds"] for replica in replicas) / first if first else None,
    )


def _size(gpu: dict[str, Any]) -> int:
    return int(gpu["memoryTotal"]) * 2**20


def _submission(job: dict[str, Any]) -> Submission:
    status = LIVE.get(job["status"], "ended")
    return Submission(status, job.get("error_type"), job.get("driver_exit_code"), job.get("message") or "")


def _config(deployment: Deployment, prefix: str, deleted_adapters: Collection[str]) -> dict[str, Any]:
    name = f"{prefix}{deployment.app_name}"
    return {
        "name": name,
        "route_prefix": f"/{name}",
        "import_path": "services.serving.app:build",
        "args": deployment.model_copy(update={"app_name": name}).model_dump(mode="json"),
        # Serve passes a changed user_config to the running replicas; a change of `args` would replace them.
        "deployments": [{"name": "policy", "user_config": {"deleted_adapters": sorted(deleted_adapters)}}],
    }


def _configs_of_others(applications: dict[str, dict[str, Any]], prefix: str) -> list[dict[str, Any]]:
    """Returns the configs of other services' applications in Ray Serve, as they were submitted.

    The names of this service's own applications begin with `prefix`. Leaves out the applications that `serve.run` has
    deployed, because a PUT to Ray Serve leaves them alone. Raises httpx.HTTPError if Ray Serve does not report a
    config.
    """
    configs = []
    for name, app in applications.items():
        if name.startswith(prefix) or app["source"] != "declarative" or app["status"] == "DELETING":
            continue
        if app.get("deployed_app_config") is None:
            sentence = (
                f"Ray Serve does not report the config of its application '{name}', "
                "and a change of this service's models would therefore remove that application."
            )
            raise httpx.HTTPError(sentence)
        configs.append(app["deployed_app_config"])
    return configs


def _application(app: dict[str, Any], prefix: str = "") -> Application:
    states: dict[str, Literal["loading", "running", "failed", "stopping"]] = {
        "RUNNING": "running",
        "DEPLOY_FAILED": "failed",
        "DELETING": "stopping",
    }
    deployments = app.get("deployments", {}).values()
    messages = [deployment.get("message", "") for deployment in deployments]
    replicas = [replica.get("state") for deployment in deployments for replica in deployment.get("replicas", ())]
    return Application(
        states.get(app["status"], "loading"),
        rays_words("\n".join([app.get("message", ""), *messages])),
        _deployed(app, prefix),
        num_ready=replicas.count("RUNNING"),
        num_replicas=len(replicas),
        deleted_adapters=_deleted_adapters(app),
    )


def _deleted_adapters(app: dict[str, Any]) -> frozenset[str]:
    configs = (app.get("deployed_app_config") or {}).get("deployments") or []
    told = [(config.get("user_config") or {}).get("deleted_adapters", ()) for config in configs]
    return frozenset(name for names in told for name in names)


def _deployed(app: dict[str, Any], prefix: str) -> Deployment | None:
    try:
        deployment = Deployment.model_validate((app.get("deployed_app_config") or {}).get("args"))
    except ValidationError:
        return None
    return deployment.model_copy(update={"app_name": deployment.app_name.removeprefix(prefix)})


def rays_words(message: str) -> str:
    """Returns the part of a message from Ray that helps a user: the line of the last error, such as "ValueError: …".
    Returns the last 300 characters if no line of the message is an error.
    """
    errors = [line for line in message.splitlines() if re.match(r"[\w.]*(Error|Exception): ", line)]
    return storable(errors[-1] if errors else message.strip()[-300:])
