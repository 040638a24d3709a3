"""A stand-in for Ray Serve's proxy, whose engines write the pieces that a test chose, one after the other."""

import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from services.contract import SCORE_TEXTS, SCORE_TOKENS, Scored, TokenGroup

LOAD = {
    "replica": "one",
    "requests_running": 1,
    "requests_waiting": 0,
    "seconds": 60,
    "tokens": 1500,
    "first_tokens": 3,
    "first_token_seconds": 0.6,
}


class Engine(ThreadingHTTPServer):
    """Answers each model's requests with its pieces in `answers`, of which one that begins with `?` is a thought."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.answers: dict[str, list[str]] = {}
        self.without_template: set[str] = set()
        self.is_full = False
        self.bodies: list[dict[str, Any]] = []
        self.pause_seconds = 0.02

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the client hung up


class Handler(BaseHTTPRequestHandler):
    server: Engine
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(200, json.dumps(LOAD))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        if self.path.endswith((SCORE_TEXTS, SCORE_TOKENS)):
            self._answer(200, scored(body).model_dump_json())
            return
        is_chat = self.path.endswith("/chat/completions")
        if self.server.is_full:
            self._answer(503, json.dumps({"error": {"message": "its queue is full"}}))
            return
        if is_chat and body["model"] in self.server.without_template:
            message = "you must provide a chat template if the tokenizer does not define one."
            self._answer(400, json.dumps({"error": {"message": message}}))
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for piece in self.server.answers[body["model"]]:
            self._send(_event(_choice(piece, is_chat, None)))
            time.sleep(self.server.pause_seconds)
        self._send(_event(_choice("", is_chat, "stop")) + b"data: [DONE]\n\n")
        self._send(b"")

    def _send(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None:
        pass


def scored(body: dict[str, Any]) -> Scored:
    """Returns log-probabilities: of texts -0.5 for each character, which is a token, and of tokens -1."""
    is_text = "vocabulary" not in body
    groups = [_tokens(group) if is_text else TokenGroup(**group) for group in body["groups"]]
    lengths = [[len(ids) for ids in group.completion_ids] for group in groups]
    outputs = [[[length * (-0.5 if is_text else -1.0)] for length in row] for row in lengths]
    usage = {"prompt_tokens": sum(map(sum, lengths))}
    return Scored(groups=groups, vocabulary="one", outputs=outputs, num_tokens=lengths, usage=usage)


def _tokens(group: dict[str, Any]) -> TokenGroup:
    texts = [completion[-1]["content"] for completion in group["completions"]]
    return TokenGroup(prompt_ids=[1], completion_ids=tuple([ord(sign) for sign in text] for text in texts))


def _event(choice: dict[str, Any]) -> bytes:
    return f"data: {json.dumps({'id': 'one', 'choices': [choice]})}\n\n".encode()


def _choice(piece: str, is_chat: bool, end: str | None) -> dict[str, Any]:
    if not is_chat:
        return {"index": 0, "text": piece, "finish_reason": end}
    delta = {"reasoning": piece[1:]} if piece.startswith("?") else {"content": piece}
    return {"index": 0, "delta": delta, "finish_reason": end}
