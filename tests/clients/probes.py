"""Sends a request to a running service for each operation and field of OpenAI's API, about objects made for it."""

import hashlib
import json
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import httpx

ENDED = ("succeeded", "failed", "cancelled")
EVENT = "fine_tuning.job.succeeded"
CHAT = {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "On the left."}]}
PAIR = {
    "input": {"messages": [{"role": "user", "content": "Where?"}]},
    "preferred_output": [{"role": "assistant", "content": "On the left."}],
    "non_preferred_output": [{"role": "assistant", "content": "No idea."}],
}


class Service:
    """A running service, and the objects that requests to it need. Each object is made when it is first used."""

    def __init__(self, base_url: str, api_key: str, model: str, hook: str) -> None:
        headers = {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(base_url=base_url, headers=headers, timeout=600, trust_env=False)
        self.model, self.hook = model, hook
        self.pairs, self.chats, self.held_out = (self.new_file(row) for row in (PAIR, CHAT, CHAT))
        self.projects = [self.made("/x/projects", name=f"conformance {number}")["id"] for number in range(2)]
        self.job, self.policy, self.checkpoint = self._trained()
        self.new_permission()
        self.endpoint = self.new_endpoint()

    def send(self, method: str, path: str, content: dict[str, Any]) -> httpx.Response:
        if method in ("GET", "DELETE"):
            return self._http.request(method, path, params=content)
        if path == "/files" or path.endswith("/parts"):
            files = {name: ("rows.jsonl", value) for name, value in content.items() if isinstance(value, bytes)}
            fields = {name: value for name, value in content.items() if name not in files}
            return self._http.post(path, data=_bracketed(fields), files=files)
        return self._http.post(path, json=content)

    def made(self, path: str, **content: Any) -> dict[str, Any]:
        answer = self.send("POST", path, content)
        assert answer.is_success, f"{path}: {answer.text}"
        return dict(answer.json())

    def new_file(self, row: Any = PAIR) -> str:
        return str(self.made("/files", file=_rows(row), purpose="fine-tune")["id"])

    def new_upload(self) -> str:
        wanted = {"filename": "rows.jsonl", "purpose": "fine-tune", "mime_type": "application/jsonl"}
        return str(self.made("/uploads", **wanted, bytes=len(_rows(PAIR)))["id"])

    def new_part(self, upload_path: str) -> str:
        return str(self.made(f"{upload_path}/parts", data=_rows(PAIR))["id"])

    def new_job(self) -> str:
        method = {"type": "dpo", "dpo": {"hyperparameters": {"batch_size": 4}}}
        return str(self.made("/fine_tuning/jobs", model=self.model, training_file=self.pairs, method=method)["id"])

    def new_paused_job(self) -> str:
        job = self.new_job()
        self.made(f"/fine_tuning/jobs/{job}/pause")
        return job

    def new_permission(self) -> str:
        path = f"/fine_tuning/checkpoints/{quote(self.policy)}/permissions"
        return str(self.made(path, project_ids=self.projects[:1])["data"][0]["id"])

    def new_endpoint(self) -> str:
        return str(self.made("/webhook_endpoints", name="one", url=self.hook, event_types=[EVENT])["id"])

    def last_of(self, path: str) -> str:
        return str(self.send("GET", path, {}).json()["data"][-1]["id"])

    def _trained(self) -> tuple[str, str, str]:
        """Runs a job to its end, and returns its id, its policy and an earlier checkpoint."""
        path = f"/fine_tuning/jobs/{self.new_job()}"
        deadline = time.monotonic() + 600
        while (job := self.send("GET", path, {}).json())["status"] not in ENDED:
            assert time.monotonic() < deadline, f"{path} does not end"
            time.sleep(0.2)
        assert job["status"] == "succeeded", job
        checkpoints = self.send("GET", f"{path}/checkpoints", {}).json()["data"]
        return job["id"], job["fine_tuned_model"], checkpoints[-1]["fine_tuned_model_checkpoint"]


def _rows(row: Any) -> bytes:
    return b"\n".join([json.dumps(row).encode()] * 12)


def _bracketed(fields: dict[str, Any]) -> dict[str, Any]:
    """Flattens nested objects as clients write them in a form, such as `a[b]`."""
    flat = {}
    for name, value in fields.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        flat |= {f"{name}[{key}]" if key else name: part for key, part in parts}
    return flat


# --- requests ------------------------------------------------------------------------------

NAMED: dict[str, Callable[[Service], str]] = {
    "{file_id}": lambda service: service.pairs,
    "{upload_id}": Service.new_upload,
    "{fine_tuning_job_id}": lambda service: service.job,
    "{fine_tuned_model_checkpoint}": lambda service: quote(service.policy),
    "{permission_id}": Service.new_permission,
    "{model}": lambda service: quote(service.policy),
    "{webhook_endpoint_id}": lambda service: service.endpoint,
}
NAMED_ELSE: dict[str, Callable[[Service], str]] = {
    "POST /fine_tuning/jobs/{fine_tuning_job_id}/cancel": Service.new_job,
    "POST /fine_tuning/jobs/{fine_tuning_job_id}/pause": Service.new_job,
    "POST /fine_tuning/jobs/{fine_tuning_job_id}/resume": Service.new_paused_job,
    "DELETE /files/{file_id}": Service.new_file,
    "DELETE /webhook_endpoints/{webhook_endpoint_id}": Service.new_endpoint,
    "DELETE /models/{model}": lambda service: quote(service.checkpoint),
}
# The least that a request holds, by dotted names; it may depend on the path that was filled in.
LEAST: dict[str, Callable[[Service, str], dict[str, Any]]] = {
    "POST /files": lambda service, path: {"file": _rows(PAIR), "purpose": "fine-tune"},
    "POST /uploads": lambda service, path: {
        "filename": "rows.jsonl",
        "purpose": "fine-tune",
        "mime_type": "application/jsonl",
        "bytes": 100,
    },
    "POST /uploads/{upload_id}/parts": lambda service, path: {"data": _rows(PAIR)},
    "POST /uploads/{upload_id}/complete": lambda service, path: {
        "part_ids": [service.new_part(path.removesuffix("/complete"))]
    },
    "POST /fine_tuning/jobs": lambda service, path: {"model": service.model, "training_file": service.chats},
    "POST /fine_tuning/checkpoints/{fine_tuned_model_checkpoint}/permissions": lambda service, path: {
        "project_ids": service.projects
    },
    "POST /webhook_endpoints": lambda service, path: {"name": "one", "url": service.hook, "event_types": [EVENT]},
    "POST /webhook_endpoints/{webhook_endpoint_id}/test": lambda service, path: {"event_type": EVENT},
    "POST /chat/completions": lambda service, path: {
        "model": service.policy,
        "messages": [{"role": "user", "content": "Where?"}],
    },
    "POST /completions": lambda service, path: {"model": service.policy, "prompt": "Where?"},
}
# What a field is tried with, if not with each of the texts that OpenAI lists, or with what LEAST has.
EXAMPLES: dict[str, Any] = {
    "limit": 1,
    "purpose": "fine-tune",
    "name": "other",
    "md5": lambda service: hashlib.md5(_rows(PAIR)).hexdigest(),
    "project_id": lambda service: service.projects[0],
    "url": lambda service: service.hook,
    "keep_old_secret_active_for_24_hours": True,
    "expires_after.seconds": 3600,
    "suffix": "mine",
    "seed": 7,
    "metadata": {"team": "shop"},
    "validation_file": lambda service: service.held_out,
    "integrations.wandb.name": "first",
    "integrations.wandb.entity": "team",
    "integrations.wandb.tags": ["dpo"],
    "beta": 0.2,
    "batch_size": 4,
    "learning_rate_multiplier": 0.5,
    "n_epochs": 1,
    "grader": {"type": "string_check"},
    "compute_multiplier": 1,
    "eval_interval": 1,
    "eval_samples": 1,
}
# What must stand beside some fields.
BESIDE: dict[str, dict[str, Any]] = {
    "expires_after.": {"expires_after.anchor": "created_at", "expires_after.seconds": 3600},
    "integrations.": {"integrations.type": "wandb", "integrations.wandb.project": "shop"},
    "method.supervised.": {"method.type": "supervised"},
    "method.dpo.": {"method.type": "dpo", "training_file": lambda service: service.pairs},
    "method.type=dpo": {"training_file": lambda service: service.pairs},
    "method.reinforcement.": {"method.type": "reinforcement"},
}


def title(operation: dict[str, Any]) -> str:
    return f"{operation['method']} {operation['path']}"


def path_of(service: Service, operation: dict[str, Any]) -> str:
    path = str(operation["path"])
    fill = NAMED_ELSE.get(title(operation))
    for word, make in NAMED.items():
        if word in path:
            path = path.replace(word, (fill or make)(service))
    return path


def content_of(service: Service, operation: dict[str, Any], path: str, tried: str, text: str) -> dict[str, Any]:
    """Returns the body of a request with the required fields and the field `tried`.

    `text` is one of the values that OpenAI lists for this field, or empty.
    """
    flat = LEAST.get(title(operation), lambda service, path: {})(service, path)
    label = f"{tried}={text}" if text else tried
    for prefix, beside in BESIDE.items():
        if label.startswith(prefix):
            flat |= beside
    if text:
        flat[tried] = [text] if isinstance(flat.get(tried), list) or tried == "event_types" else text
    elif tried == "after":
        flat["after"] = service.last_of(path)
    elif tried == "metadata" and operation["method"] == "GET":
        flat["metadata[team]"] = "shop"
    elif tried and tried not in flat:
        flat[tried] = EXAMPLES[tried] if tried in EXAMPLES else EXAMPLES[tried.rsplit(".", 1)[-1]]
    return _nested({name: value(service) if callable(value) else value for name, value in flat.items()})


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in flat.items():
        at, *names = content, *name.split(".")
        for part in names[:-1]:
            at = at.setdefault(part, {})
        at[names[-1]] = value
    if "integrations" in content:
        content["integrations"] = [content["integrations"]]
    return content
