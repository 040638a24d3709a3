"""Defines a web server on loopback that can break off, redirect and refuse."""

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

Server = TypeVar("Server", bound=ThreadingHTTPServer)


class Web(ThreadingHTTPServer):
    """Serves `files` by their paths. `cuts` holds the byte at which each of the next answers breaks off; None: it does
    not."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.port = self.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.files: dict[str, bytes] = {}
        self.statuses: dict[str, list[int]] = {}  # of the next answers
        self.redirects: dict[str, str] = {}
        self.etag: str | None = '"one"'
        self.ranges = self.lengths = True
        self.cuts: list[int | None] = []
        self.pause_seconds = 0.0  # before each answer's body
        self.requests: list[tuple[str, dict[str, str]]] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the client hung up


class Handler(BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        web = self.server
        web.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        path = self.path.partition("?")[0]
        if location := web.redirects.get(path):
            return self._answer(302, b"", {"Location": location})
        if statuses := web.statuses.get(path):
            return self._answer(statuses.pop(0), b"")
        if path not in web.files:
            return self._answer(404, b"")
        data, headers = web.files[path], {"ETag": web.etag} if web.etag else {}
        asked = self.headers.get("Range")
        if asked and web.ranges and self.headers.get("If-Range") == web.etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self._answer(206, data[start:], headers)
        return self._answer(200, data, headers)

    do_HEAD = do_GET  # S3's client asks so, of what it is refused

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        cut = self.server.cuts.pop(0) if self.server.cuts and status in (200, 206) else None
        self.send_response(status)
        length = {"Content-Length": str(len(body))} if self.server.lengths else {}
        for name, value in (length | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.flush()
        time.sleep(self.server.pause_seconds)
        self.wfile.write(body[:cut])
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def running(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:  # otherwise pytest would wait for this thread after a test that failed
        server.shutdown()
        server.server_close()
        thread.join()


def running_web() -> AbstractContextManager[Web]:
    return running(Web())
