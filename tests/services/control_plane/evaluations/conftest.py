"""Provides an HTTP server in place of Ray Serve that answers as OpenAI's API does, and a trained policy."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import psycopg
import pytest

from dpo_core.config import TrainConfig
from dpo_core.options import Dpo
from services.contract import JobSpec
from services.control_plane.core import leases
from services.control_plane.evaluations import work
from services.control_plane.settings import BaseModel, Settings
from tests.services.control_plane.conftest import FakeRay

POLICY, REWARD_MODEL = "ft:tiny:raydpo::one", "ft:tiny:raydpo::reward"
LOGP: dict[str, Callable[[int], float]] = {  # of a token, by the model; of the reward model, its reward
    "policy": lambda token: -1 - token % 3 / 10,
    "reference": lambda token: -1.5,
    "reward": lambda token: 0.5,
}


class Engines:
    """Answers for all models. A policy answers with a `good` text, every other model with a `bad` one. Of several
    answers to a prompt, each has one word more than the one before.

    Every judge is given by its name: `first` always prefers the first answer, `fair` the good one, `long` the long one.
    All of them grade a good answer with 9, and others with the word count of the answer.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []  # models and bodies
        self.failing: Counter[str] = Counter()  # how many requests to a model fail from now on
        self.refusing: set[str] = set()  # texts that a model refuses
        self.killing: set[str] = set()  # texts that kill the replica of a model
        self.ends_engines = False  # whether they end the replica's engine, which the replica tells, and not the replica
        self.endings: dict[str, str] = {}  # what models add to their answers
        self.beside: list[
            int
        ] = []  # how many requests for completions were under way when each arrived, itself included
        self.is_away = False  # whether all answers are that the model cannot be asked now
        self.delay = 0.0
        self._under_way, self._lock = 0, threading.Lock()
        self._words: dict[str, int] = {}
        engines = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                status, answer = engines.score(self.path, body) if "/score/" in self.path else engines.count(body)
                data = b"Internal Server Error" if answer is None else json.dumps(answer).encode()
                self.send_response(status)
                if answer is not None:
                    self.send_header("x-request-id", "a")
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}).start()

    def count(self, body: dict[str, Any]) -> tuple[int, dict[str, Any] | None]:
        """Returns what `answer` does, and counts the requests that are under way."""
        with self._lock:
            self._under_way += 1
            self.beside.append(self._under_way)
        try:
            return self.answer(body)
        finally:
            with self._lock:
                self._under_way -= 1

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any] | None]:
        """Returns the status and the body of the answer. Without a body, it is the one of Ray Serve's proxy in place of
        a replica that has died.
        """
        model = body["model"]
        self.asked.append((model, body))
        time.sleep(self.delay)
        if self.is_away:
            return 503, {"error": {"message": "The engine has died."}}
        if self.failing[model] > 0:
            self.failing[model] -= 1
            return 500, {"error": {"message": "out of luck"}}
        prompt = body.get("prompt") or body["messages"][-1]["content"]
        if any(text in prompt for text in self.refusing):
            return 400, {"error": {"message": "I do not take this."}}
        if any(text in prompt for text in self.killing):
            return (503, {"error": {"message": "Dead.", "type": "engine_died"}}) if self.ends_engines else (500, None)
        choices = body.get("structured_outputs", {}).get("choice")
        text = self._verdict(model, prompt) if choices else self._text(model, prompt)
        text = self._grade(prompt) if choices and "10" in choices else text
        texts = [f"{text}{' very' * i}" for i in range(body.get("n", 1))]
        usage = {"prompt_tokens": 10, "completion_tokens": sum(len(each.split()) for each in texts)}
        return 200, {"choices": [self._choice(body, i, each) for i, each in enumerate(texts)], "usage": usage}

    def _choice(self, body: dict[str, Any], index: int, text: str) -> dict[str, Any]:
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
        said = {"text": text} if "prompt" in body else said
        if body.get("return_token_ids"):
            said |= {"token_ids": self.ids(text), "prompt_token_ids": [1]}
        ends = "length" if len(text.split()) >= body["max_tokens"] else "stop"
        return {"index": index, "finish_reason": ends, **said}

    def ids(self, text: str) -> list[int]:
        """Returns an id for each word, and that of the end."""
        return [self._words.setdefault(word, len(self._words) + 1) for word in text.split()] + [0]

    def score(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Scores as models' applications do. A reward model rewards each token."""
        groups = [group if "prompt_ids" in group else self._encoded(group) for group in body["groups"]]
        model = "reward" if "reward" in path else "policy" if "one" in path else "reference"
        outputs = [[[sum(map(LOGP[model], ids))] for ids in group["completion_ids"]] for group in groups]
        num_tokens = [list(map(len, group["completion_ids"])) for group in groups]
        scored = {"groups": groups, "vocabulary": "words", "outputs": outputs, "num_tokens": num_tokens}
        return 200, scored | {"usage": {"prompt_tokens": 7}}

    def _encoded(self, group: dict[str, Any]) -> dict[str, Any]:
        texts = [each if isinstance(each, str) else each[-1]["content"] for each in group["completions"]]
        return {"prompt_ids": [1], "completion_ids": list(map(self.ids, texts))}

    def _text(self, model: str, prompt: str) -> str:
        number = prompt.rpartition(" ")[2]
        text = f"good answer {number}" if model.startswith("ft:") else f"a bad answer to {number}"
        return text + self.endings.get(model, "")

    def _verdict(self, model: str, question: str) -> str:
        first, second = (
            question.partition(f"<answer_{side}>\n")[2].partition(f"\n</answer_{side}>")[0] for side in "ab"
        )
        if model == "long":
            return "A" if len(first) > len(second) else "B"
        if model == "first" or ("good" in first and "good" not in second):
            return "A"
        return "B" if "good" in second and "good" not in first else "C"

    def _grade(self, question: str) -> str:
        answer = question.partition("<answer>\n")[2].partition("\n</answer>")[0]
        return "9" if "good" in answer else str(len(answer.split()))

    def counts(self) -> Counter[str]:
        return Counter(model for model, _ in self.asked)


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    engines = Engines()
    yield engines
    engines.server.shutdown()
    engines.server.server_close()


@pytest.fixture(autouse=True)
def calm(engines: Engines) -> None:
    engines.asked.clear()
    engines.beside.clear()
    engines.failing.clear()
    engines.refusing.clear()
    engines.killing.clear()
    engines.endings.clear()
    engines.delay, engines.is_away, engines.ends_engines = 0.0, False, False


@pytest.fixture(scope="module")
def settings(offline: Settings, fake_ray: FakeRay, engines: Engines) -> Iterator[Settings]:
    urls = {
        "ray_url": f"http://127.0.0.1:{fake_ray.server.server_port}",
        "serve_url": f"http://127.0.0.1:{engines.server.server_port}",
        "model_wait_seconds": 20.0,
        "max_loaded_models": 10,
    }
    models = {name: BaseModel(source=f"/nowhere/{name}") for name in ("tiny", "fair", "first", "long")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leases, "TICK_SECONDS", 0.05)
        patch.setattr(work, "LOOK_SECONDS", 0.05)
        patch.setattr(work, "RETRY_SECONDS", 0.05)
        patch.setattr(work, "PAUSE_SECONDS", 0.1)
        patch.setattr(work, "LONGEST_PAUSE_SECONDS", 0.5)
        patch.setattr("services.control_plane.tenants.usage.FLUSH_SECONDS", 0.1)
        yield offline.model_copy(update=urls | {"models": models})


@pytest.fixture(scope="module")
def policy(base_url: str, settings: Settings) -> str:
    """Adds a policy that a job has trained from the base model `tiny`, and returns its name."""
    add_policy(settings)
    return POLICY


def add_policy(settings: Settings) -> None:
    spec = JobSpec(model="tiny", training_file="file-1", config=TrainConfig(objective=Dpo(beta=0.1)))
    columns = "id, spec, model_source, fine_tuned_model, project_id, model_root, priority, desired, observed, version"
    values = "'ftjob-one', %s, '/nowhere/tiny', %s, 'proj_default', 'tiny', 0, 'run', 'succeeded', 1"
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        job = (spec.model_dump_json(), POLICY)
        connection.execute(f"INSERT INTO jobs ({columns}, finished_at) VALUES ({values}, now())", job)
        columns, values = "id, project_id, source, root, job_id, num_outputs", "%s, 'proj_default', %s, 'tiny', %s, %s"
        for name, source, num_outputs in ((POLICY, "file:///nowhere/one", 0), (REWARD_MODEL, "file:///nowhere/r", 1)):
            model = (name, source, "ftjob-one", num_outputs)
            connection.execute(f"INSERT INTO models ({columns}) VALUES ({values})", model)


def chats(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": [{"role": "user", "content": f"Question {number}"}], **more} for number in range(count)]


def created(api: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = api.post("/x/evaluations", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def ended(api: httpx.Client, evaluation_id: str, *, seconds: float = 300) -> dict[str, Any]:
    """Waits until the evaluation has ended, and returns it."""
    deadline = time.monotonic() + seconds
    while True:
        found: dict[str, Any] = api.get(f"/x/evaluations/{evaluation_id}").json()
        if found["status"] in ("succeeded", "failed", "cancelled"):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def until(holds: Callable[[], Any], *, seconds: float = 300) -> Any:
    """Waits until `holds` returns something true, and returns that."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def results(api: httpx.Client, **body: Any) -> dict[str, Any]:
    """Runs an evaluation, and returns its results."""
    found = ended(api, created(api, **body)["id"])
    assert found["status"] == "succeeded", found
    return dict(found["results"])


@pytest.fixture
def upload(api: httpx.Client) -> Callable[[list[dict[str, Any]]], str]:
    """Returns a function that uploads rows as a training file, and returns its id."""

    def send(rows: list[dict[str, Any]]) -> str:
        body = "\n".join(map(json.dumps, rows)).encode()
        answer = api.post("/files", files={"file": ("rows.jsonl", body)}, data={"purpose": "fine-tune"})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    return send
