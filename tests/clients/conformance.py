"""Tries each operation and field of OpenAI's API on a service, and prints the table of what the service answers.

    python -m tests.clients.conformance MODEL > docs/wire/conformance.md

OPENAI_BASE_URL and OPENAI_API_KEY name a service that nobody else uses at the same time. HOOKS_PORT is a port of
loopback that its setting `webhook_urls` admits. A small job is trained; others are cancelled.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx

from tests.clients.probes import Service, content_of, path_of, title

SURFACE = json.loads(Path(__file__).with_name("surface.json").read_text())
BY_NAME = ("unsupported_value", "unknown_parameter")  # codes of refusals
STRANGE = "unheard_of"  # a field that nobody has
MANY = 6  # values are counted, not listed

HEAD = """\
# What of OpenAI's API is there

A test tries each operation, and each field with each of the values that OpenAI lists, on a running service. It prints
this page and compares. Of {operations} operations {offered} are offered, the others are refused by name; {works}
fields and values are taken, {refused} refused by name, {missing} missing. What OpenAI does not have is refused as well.

It compares with {sources}.
"""

WHY = """\
- **Purposes**: files are there to train on; results are made by jobs.
- **`reinforcement` and graders**: preference data need no grader.
- **Events**: the service does nothing else that could be told of.
- **`GET /chat/completions`**: completions are not kept.
- **`shutdown_date`**: a model is there until you delete it.

`POST /chat/completions` and `POST /completions` are forwarded to vLLM, whose fields they are. `paused` is what OpenAI's
example of a paused job shows as its `status`; its list of statuses lacks it."""


@dataclass
class Found:
    """Records which fields and values of one operation work, and which are refused or missing."""

    title: str
    refusal: str = ""  # of the operation itself
    works: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # of the answer


def probe(service: Service, operation: dict[str, Any]) -> Found:
    found = Found(title(operation))
    answer = _ask(service, operation, "", "")
    if _refusal(answer, ""):
        found.refusal = answer.json()["error"]["message"]
        return found
    if not answer.is_success:
        found.missing.append(f"itself: {answer.status_code} {answer.text[:200]}")
        return found
    found.left_out = _left_out(operation, answer)
    for name, texts in operation["fields"].items():
        for text in texts or [""]:
            _sort(found, name, f"{name}={text}" if text else name, _ask(service, operation, name, text))
    takes_content = operation["fields"] or operation["method"] != "POST"
    if takes_content and operation["answer"] and not _refusal(_ask(service, operation, STRANGE, STRANGE), STRANGE):
        found.missing.append("a field that OpenAI does not have is ignored")
    return found


def _sort(found: Found, name: str, label: str, answer: httpx.Response) -> None:
    if answer.is_success:
        found.works.append(label)
    elif _refusal(answer, name):
        found.refused.append(label)
    else:
        found.missing.append(f"{label}: {answer.status_code} {answer.text[:200]}")


def _ask(service: Service, operation: dict[str, Any], tried: str, text: str) -> httpx.Response:
    path = path_of(service, operation)
    answer = service.send(operation["method"], path, content_of(service, operation, path, tried, text))
    if title(operation) == "POST /fine_tuning/jobs" and answer.is_success:
        service.made(f"{path}/{answer.json()['id']}/cancel")
    return answer


def _refusal(answer: httpx.Response, name: str) -> bool:
    """Whether the answer refuses the field `name`, or another field of the same object."""
    if answer.status_code != 400:
        return False
    error = answer.json()["error"]
    return error["code"] in BY_NAME and error["param"].split(".")[0].startswith(name.split(".")[0])


def _left_out(operation: dict[str, Any], answer: httpx.Response) -> list[str]:
    if not operation["answer"]:
        return []
    body = answer.json()
    items = body.get("data") or []
    there = set(body) | {f"data.{name}" for item in items if isinstance(item, dict) for name in item}
    return [name for name in operation["answer"] if name not in there]


# --- the table -----------------------------------------------------------------------------


def table(found: list[Found]) -> Iterator[str]:
    offered = sum(not row.refusal for row in found)
    works, refused, missing = (
        sum(len(getattr(row, part)) for row in found) for part in ("works", "refused", "missing")
    )
    yield HEAD.format(
        operations=len(found),
        offered=offered,
        works=works,
        refused=refused,
        missing=missing,
        sources=", ".join(SURFACE["sources"]),
    )
    yield "| operation | | takes | refuses by name | not in its answers |"
    yield "|---|---|---|---|---|"
    for row in found:
        offers = f"refused: {row.refusal}" if row.refusal else "yes"
        if row.missing:
            offers = "missing: " + "; ".join(row.missing)
        yield f"| `{row.title}` | {offers} | {_names(row.works)} | {_names(row.refused)} | {_names(row.left_out)} |"
    yield ""
    yield "## Why"
    yield ""
    yield WHY


def _names(labels: list[str]) -> str:
    """Returns fields for the table; several values of one field are listed together."""
    fields: dict[str, list[str]] = {}
    for label in labels:
        name, _, text = label.partition("=")
        fields.setdefault(name, []).extend([text] if text else [])
    return ", ".join(f"`{name}`{_listed(texts)}" for name, texts in fields.items())


def _listed(texts: list[str]) -> str:
    if len(texts) > MANY:
        return f" ({len(texts)} values)"
    return f" ({', '.join(texts)})" if texts else ""


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        return


def main(model: str) -> None:
    receiver = HTTPServer(("127.0.0.1", int(os.environ["HOOKS_PORT"])), Receiver)
    Thread(target=receiver.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    hook = f"http://127.0.0.1:{receiver.server_port}/hooks"
    service = Service(os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"], model, hook)
    found = [probe(service, operation) for operation in SURFACE["operations"]]
    print("\n".join(table(found)))
    receiver.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
