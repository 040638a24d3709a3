"""Tests the command that runs lm_eval: how it starts the program, and that the real program continues after a kill."""

import itertools
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import tomllib
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.cli.app import app
from services.cli.models.lm_eval import NUM_CONCURRENT, REQUIREMENT
from tests.clients import installed
from tests.e2e.conftest import wait_for
from tests.services.web import running

PROGRAM = f"""#!{sys.executable}
import json, os, pathlib, sys
arguments = sys.argv[1:]
pathlib.Path(os.environ["SEEN"]).write_text(json.dumps([arguments, os.environ["OPENAI_API_KEY"]]))
cache = pathlib.Path(arguments[arguments.index("--use_cache") + 1] + "_rank0.db")
cache.parent.mkdir(parents=True, exist_ok=True)
cache.touch()
print("|task|acc|")
sys.exit("broken" in arguments)
"""
TASK = """
task: questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


class Model(ThreadingHTTPServer):
    """Answers each question in upper case, and keeps the paths, the keys and the questions that it was asked.

    While `is_open` is not set, it answers at most `most` requests; the others wait. The next requests are refused with
    `refusals`.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.refusals, self.most, self.is_open = [], [], 0, threading.Event()
        self.numbers = itertools.count()
        self.is_open.set()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        model = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        question = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        if model.refusals:
            return self.answer(*model.refusals.pop(0))
        model.asked.append((self.path, self.headers["authorization"], question))
        if next(model.numbers) >= model.most:
            model.is_open.wait()
        said = {"message": {"role": "assistant", "content": question.upper()}, "text": question.upper()}
        return self.answer(200, {"id": "c", "choices": [{"index": 0, "finish_reason": "stop", **said}]})

    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.send_header("retry-after", "0")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def model(monkeypatch):
    with running(Model()) as model:
        monkeypatch.setenv("RAYDPO_URL", f"http://127.0.0.1:{model.server_port}/v1")
        monkeypatch.setenv("RAYDPO_API_KEY", "rd-any")
        yield model
        model.is_open.set()


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a program `lm-eval` into PATH, which notes how it was called. Returns a function that reads the note."""
    file = tmp_path / "bin" / "lm-eval"
    file.parent.mkdir()
    file.write_text(PROGRAM)
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(file.parent))
    monkeypatch.setenv("SEEN", str(tmp_path / "seen.json"))
    monkeypatch.chdir(tmp_path)
    return lambda: json.loads((tmp_path / "seen.json").read_text())


@pytest.fixture
def evaluations():
    return lambda *arguments: CliRunner().invoke(app, ["evaluations", *arguments])


def test_without_lm_eval_the_command_says_how_to_install_it(model, monkeypatch, evaluations):
    monkeypatch.setenv("PATH", "")
    refused = evaluations("lm-eval", "tiny", "--tasks", "gsm8k")
    assert refused.exit_code == 1
    assert f"uv tool install '{REQUIREMENT}' --with transformers" in refused.stderr
    assert model.asked == []


def test_the_version_is_the_one_of_the_extra():
    project = tomllib.loads((Path(__file__).parents[4] / "pyproject.toml").read_text())["project"]
    assert REQUIREMENT in project["optional-dependencies"]["lm-eval"]


def test_a_model_that_is_not_there_is_refused_before_lm_eval_starts(raydpo, program, tmp_path):
    refused = raydpo("evaluations", "lm-eval", "nobody", "--tasks", "gsm8k")
    assert refused.exit_code == 1
    assert "nobody" in refused.stderr
    assert not (tmp_path / "seen.json").exists()


def test_the_command_waits_until_the_model_is_loaded(model, program, evaluations):
    model.refusals = [(503, {"error": {"message": "The model loads."}})] * 2
    done = evaluations("lm-eval", "tiny", "--tasks", "gsm8k")
    assert done.exit_code == 0, done.output
    assert len(model.asked) == 1


def test_a_refused_request_ends_the_command_with_the_services_words(model, program, evaluations, tmp_path):
    model.refusals = [(400, {"error": {"message": "tiny is a reward model."}})]
    refused = evaluations("lm-eval", "tiny", "--tasks", "gsm8k")
    assert (refused.exit_code, refused.stderr) == (1, "error: tiny is a reward model.\n")
    assert not (tmp_path / "seen.json").exists()


def test_without_a_tokenizer_lm_eval_chats_with_the_users_key(model, program, evaluations, tmp_path):
    done = evaluations("lm-eval", "ft:a:b::1", "--tasks", "gsm8k,ifeval", "--", "--limit", "3")
    assert done.exit_code == 0, done.output
    assert model.asked == [("/v1/chat/completions", "Bearer rd-any", "?")]
    (run, *arguments), key = program()
    assert (run, key) == ("run", "rd-any")
    assert "rd-any" not in " ".join(arguments)
    assert arguments[-2:] == ["--limit", "3"]
    assert arguments[arguments.index("--tasks") + 1] == "gsm8k,ifeval"
    assert arguments[arguments.index("--model") + 1] == "local-chat-completions"
    assert "--apply_chat_template" in arguments
    asked = json.loads(arguments[arguments.index("--model_args") + 1])
    assert (asked["model"], asked["base_url"]) == (
        "ft:a:b::1",
        f"http://127.0.0.1:{model.server_port}/v1/chat/completions",
    )
    assert list((tmp_path / "lm-eval").iterdir()) == []  # the answers so far are no longer needed


def test_with_a_tokenizer_lm_eval_sends_prompts_as_they_are(model, program, evaluations):
    assert evaluations("lm-eval", "tiny", "--tasks", "mmlu", "--tokenizer", "org/name").exit_code == 0
    assert model.asked == [("/v1/completions", "Bearer rd-any", "?")]
    arguments, _ = program()
    assert arguments[arguments.index("--model") + 1] == "local-completions"
    assert "--apply_chat_template" not in arguments
    asked = json.loads(arguments[arguments.index("--model_args") + 1])
    assert asked["base_url"] == f"http://127.0.0.1:{model.server_port}/v1/completions"
    assert (asked["tokenizer"], asked["tokenizer_backend"]) == ("org/name", "huggingface")


def test_a_failure_of_lm_eval_is_one_of_the_command_and_keeps_the_answers(model, program, evaluations, tmp_path):
    failed = evaluations("lm-eval", "a/b", "--tasks", "x", "--output", "out", "--", "broken")
    assert failed.exit_code == 1
    assert "lm_eval ended with status 1." in failed.stderr
    assert "need --tokenizer" in failed.stderr
    (kept,) = (tmp_path / "out").iterdir()
    assert re.fullmatch(r"a%2Fb\.[0-9a-f]{8}\.unfinished_rank0\.db", kept.name)


def test_the_answers_of_one_service_are_not_continued_with_those_of_another(
    model, program, evaluations, tmp_path, monkeypatch
):
    command = ("lm-eval", "tiny", "--tasks", "x", "--output", "out")
    evaluations(*command, "--", "broken")
    (kept,) = (tmp_path / "out").iterdir()
    kept.write_text("answers of the first service")
    with running(Model()) as other:
        monkeypatch.setenv("RAYDPO_URL", f"http://127.0.0.1:{other.server_port}/v1")
        assert evaluations(*command).exit_code == 0
    assert kept.read_text() == "answers of the first service"
    arguments, _ = program()
    assert arguments[arguments.index("--use_cache") + 1] not in str(kept)


@pytest.mark.long
def test_after_a_kill_the_real_lm_eval_asks_only_what_is_left(model, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(installed.lm_eval()), prepend=":")
    rows = [{"question": f"q{number}", "answer": f"Q{number}" if number % 4 else "?"} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "questions.yaml").write_text(TASK.format(data=tmp_path / "rows.jsonl"))
    raydpo = str(Path(sys.executable).with_name("raydpo"))
    command = [raydpo, "evaluations", "lm-eval", "tiny", "--tasks", "questions", "--output", str(tmp_path / "out")]
    command += ["--", "--include_path", str(tmp_path / "tasks")]

    def unfinished():
        return list((tmp_path / "out").glob("tiny.*.unfinished_rank0.db"))

    def num_kept():
        if not unfinished():
            return 0
        with closing(sqlite3.connect(unfinished()[0])) as database:
            try:
                return database.execute("SELECT count(*) FROM unnamed").fetchone()[0]
            except sqlite3.OperationalError:
                return 0

    model.most = 1 + 11  # the command's own request is the first
    model.is_open.clear()
    first = subprocess.Popen(command, start_new_session=True)
    wait_for(lambda: num_kept() == 11, "lm_eval keeps the answers")
    wait_for(lambda: len(model.asked) == 1 + 11 + NUM_CONCURRENT, "the next requests wait")
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    model.is_open.set()
    del model.asked[:]
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    assert second.stdout.count("|questions|") == 1
    assert sum(question != "?" for _, _, question in model.asked) == 40 - 11
    (results,) = (tmp_path / "out" / "tiny").glob("results_*.json")
    assert json.loads(results.read_text())["results"]["questions"]["exact_match,none"] == 0.75
    assert unfinished() == []
