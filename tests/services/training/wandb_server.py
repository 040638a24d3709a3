"""Defines a small server on loopback that answers what one run of W&B asks.

It keeps the run's history, and returns it to a client that resumes the run.
"""

import gzip
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.run: dict[str, Any] = {}  # as it was asked for
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None
        self.keys: set[str | None] = set()

    def answer(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "1", "name": given.get("project"), "entity": {"id": "1", "name": "team"}}
        if operation == "RunResumeStatus":
            return {"model": {**project, "bucket": self._known() if self.run else None}}
        if operation == "UpsertBucket":
            inserted = not self.run
            self.run |= {key: value for key, value in given.items() if value is not None}
            bucket = {"id": "1", "name": given["name"], "config": "{}", "historyLineCount": 0, "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        return {}

    def _known(self) -> dict[str, Any]:
        return {
            "name": self.run["name"],
            "displayName": self.run["displayName"],
            "summaryMetrics": json.dumps(self.summary),
            "historyLineCount": len(self.history),
            "historyTail": json.dumps([json.dumps(row) for row in self.history[-1:]]),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "config": self.run["config"],
            "wandbConfig": '{"t": 1}',
            "tags": [],
        }

    def stream(self, body: dict[str, Any]) -> None:
        files = body.get("files") or {}
        if rows := files.get("wandb-history.jsonl"):
            self.history[rows["offset"] :] = [json.loads(line) for line in rows["content"]]
        if summary := files.get("wandb-summary.json"):
            self.summary |= json.loads(summary["content"][-1])
        if body.get("complete"):
            self.exit_code = body["exitcode"]


class Handler(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self._body()
        self.server.keys.add(self.headers["Authorization"])
        if self.path == "/graphql":
            self._send({"data": self.server.answer(body["operationName"], body.get("variables") or {})})
            return
        self.server.stream(body)
        self._send({})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self._send({})

    def _body(self) -> Any:
        data = self.rfile.read(int(self.headers["Content-Length"] or 0))
        return json.loads(gzip.decompress(data) if self.headers["Content-Encoding"] == "gzip" else data)

    def _send(self, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass
