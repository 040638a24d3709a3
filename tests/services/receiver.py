"""Defines a web server on loopback that receives webhooks and answers as a test wants."""

import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Behaviour:
    """Says how the receiver answers requests for one path."""

    statuses: list[int] = field(default_factory=list)  # of the next answers; then 200
    location: str = ""  # where a redirect leads
    pause_seconds: float = 0.0  # before an answer
    endless: bool = False  # its answers never end
    most_at_once: int = 0  # seen so far


@dataclass(frozen=True)
class Received:
    path: str
    headers: dict[str, str]
    body: bytes


class Receiver(ThreadingHTTPServer):
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.paths: dict[str, Behaviour] = {}
        self.received: list[Received] = []
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self.at_once: dict[str, int] = {}

    def at(self, path: str) -> list[Received]:
        return [message for message in self.received if message.path == path]

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the sender hung up


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        receiver, path = self.server, self.path
        behaviour = receiver.paths.setdefault(path, Behaviour())
        body = self.rfile.read(int(self.headers["content-length"]))
        with receiver.lock:
            receiver.received.append(Received(path, {k.lower(): v for k, v in self.headers.items()}, body))
            receiver.at_once[path] = receiver.at_once.get(path, 0) + 1
            behaviour.most_at_once = max(behaviour.most_at_once, receiver.at_once[path])
        try:
            receiver.stopping.wait(behaviour.pause_seconds)
            self.answer(behaviour)
        finally:
            with receiver.lock:
                receiver.at_once[path] -= 1

    def answer(self, behaviour: Behaviour) -> None:
        self.send_response(behaviour.statuses.pop(0) if behaviour.statuses else 200)
        self.send_header("Set-Cookie", "seen=yes; Max-Age=1000")
        if behaviour.location:
            self.send_header("Location", behaviour.location)
        if not behaviour.endless:
            self.send_header("Content-Length", "0")
        self.end_headers()
        while behaviour.endless and not self.server.stopping.is_set():
            self.wfile.write(b"x" * 1024)
            time.sleep(0.01)

    def log_message(self, *_: Any) -> None:
        pass
