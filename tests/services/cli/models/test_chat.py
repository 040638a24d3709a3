"""Tests the command that talks to a model."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from services.cli.app import app
from tests.services.web import running


def test_chat_with_an_unknown_model_says_so(raydpo):
    refused = raydpo("chat", "nobody", "Hello?")
    assert refused.exit_code == 1
    assert "nobody" in refused.stderr


class Model(ThreadingHTTPServer):
    """Answers `/v1/chat/completions` with a stream that repeats the last question, and keeps what it was asked."""

    def __init__(self):
        self.asked = asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                asked.append(body)
                question = body["messages"][-1]["content"]
                chunks = [
                    {"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in ("You said: ", question)
                ]
                lines = [json.dumps({"id": "c", "object": "chat.completion.chunk"} | chunk) for chunk in chunks]
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.end_headers()
                self.wfile.write("".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"]).encode())

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def model(monkeypatch):
    with running(Model()) as model:
        monkeypatch.setenv("RAYDPO_URL", f"http://127.0.0.1:{model.server_port}/v1")
        monkeypatch.setenv("RAYDPO_API_KEY", "rd-any")
        yield model


def chat(*arguments, **options):
    return CliRunner().invoke(app, ["chat", "tiny", *arguments], **options)


def test_a_single_question_is_answered_once_with_the_options_that_were_given(model):
    done = chat("Hello?", "--system", "Be kind.", "--temperature", "0", "--max-tokens", "7")
    assert (done.exit_code, done.stdout) == (0, "You said: Hello?\n")
    (asked,) = model.asked
    assert (asked["model"], asked["temperature"], asked["max_tokens"], asked["stream"]) == ("tiny", 0, 7, True)
    assert [message["content"] for message in asked["messages"]] == ["Be kind.", "Hello?"]


def test_a_conversation_holds_all_that_was_said_and_skips_empty_lines(model):
    done = chat(input="one\n\n  \ntwo\n")
    assert (done.exit_code, done.stdout) == (0, "You said: one\nYou said: two\n")
    assert [(message["role"], message["content"]) for message in model.asked[1]["messages"]] == [
        ("user", "one"),
        ("assistant", "You said: one"),
        ("user", "two"),
    ]
