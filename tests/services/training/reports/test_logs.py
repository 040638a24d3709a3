"""Tests the copying of a process's output. Each test prints in a separate process, whose output goes to files."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services import storage
from services.training.reports.logs import (
    FIRST_BYTES,
    LAST_BYTES,
    LINE_BYTES,
    SEGMENT_BYTES,
    Log,
    Tail,
    blank,
    patterns_of,
)

ROOT = Path(__file__).parents[4]


FOLDER = "run/logs/2/worker-0"


def kept(folder: Path) -> str:
    """Returns the text of all stored segments, and asserts that they follow each other without gaps."""
    text = b""
    for name in storage.list_files(str(folder)):
        assert int(name.removesuffix(".log")) == len(text)
        text += (folder / name).read_bytes()
    return text.decode()


def until_kept(folder: Path, text: str) -> str:
    deadline = time.monotonic() + 300
    while text not in kept(folder):
        assert time.monotonic() < deadline, kept(folder)
        time.sleep(0.1)
    return kept(folder)


def start(folder: Path, program: str, **environment: str) -> subprocess.Popen[bytes]:
    keep = f"from services.training.reports.logs import keep_logs; keep_logs('{folder}/run', 2, 'worker-0')\n"
    given = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    with (folder / "out").open("ab") as out, (folder / "err").open("ab") as err:
        return subprocess.Popen([sys.executable, "-u", "-c", keep + program], env=given, stdout=out, stderr=err)


@pytest.mark.slow
def test_what_a_process_prints_is_kept_while_it_runs_and_when_it_is_killed(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("printed before\n")
    program = (
        "import os, time; print(':actor_name:worker'); print('while it runs')\n"
        "os.write(2, b'a library, to standard error\\n')\n"
        f"while not os.path.exists('{tmp_path}/go'): time.sleep(0.05)\n"
        "print('last', 'words', end=''); os.kill(os.getpid(), 9)"
    )
    with start(tmp_path, program) as process:
        until_kept(tmp_path / FOLDER, "a library, to standard error\n")
        (tmp_path / "go").touch()
    assert process.returncode == -signal.SIGKILL
    until_kept(tmp_path / FOLDER, "last words\n")
    with start(tmp_path, "print('and again'); 1 / 0"):  # as Ray starts a worker that died once more
        pass
    text = until_kept(tmp_path / FOLDER, "ZeroDivisionError")
    assert text.index("printed before\nwhile it runs\n") < text.index("last words\n") < text.index("and again\n")
    assert "actor_name" not in text


def test_no_secret_is_kept(tmp_path: Path) -> None:
    token, key = "token-of-the-attempt", "rd-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    said = [
        f"it is {token}!",
        f"a key: {key}.",
        "GET https://bucket.example/rows.jsonl?X-Amz-Signature=abc&x=y done",
        "postgresql://user:password@host/db",
        "{'Authorization': 'Bearer abc.def-1'}",
        "1 + 1 = 2? yes",
    ]
    with start(tmp_path, f"for line in {said!r}: print(line)", RAYDPO_ATTEMPT_TOKEN=token):
        pass
    assert until_kept(tmp_path / FOLDER, "yes").splitlines() == [
        "it is ***!",
        "a key: ***.",
        "GET https://bucket.example/rows.jsonl?*** done",
        "postgresql://***@host/db",
        "{'Authorization': 'Bearer ***'}",
        "1 + 1 = 2? yes",
    ]


def test_colours_and_what_served_models_print_are_left_out(tmp_path: Path) -> None:
    said = ["\x1b[36m(ServeReplica:ft pid=1)\x1b[0m somebody's", "\x1b[36m(RayTrainWorker pid=2)\x1b[0m its own"]
    with start(tmp_path, f"for line in {said!r}: print(line)"):
        pass
    assert until_kept(tmp_path / FOLDER, "its own") == "(RayTrainWorker pid=2) its own\n"


def test_output_to_a_terminal_or_a_pipe_is_not_kept_and_said_so(tmp_path: Path) -> None:
    program = f"from services.training.reports.logs import keep_logs; keep_logs('{tmp_path}', 1, 'driver')"
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "no log of it is stored" in done.stderr


def test_segments_are_of_whole_lines_and_the_last_one_is_rewritten_until_it_is_full(tmp_path: Path) -> None:
    log, line = Log(str(tmp_path)), b"x" * 999 + b"\n"
    log.add(line)
    log.store()
    log.add(line)
    log.store()
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == {"000000000000.log": 2000}
    for _ in range(300):
        log.add(line)
    log.store()
    assert kept(tmp_path) == line.decode() * 302
    sizes = [path.stat().st_size for path in sorted(tmp_path.iterdir())]
    assert sizes == [SEGMENT_BYTES // 1000 * 1000, 302000 - SEGMENT_BYTES // 1000 * 1000]


def test_of_a_long_log_the_beginning_and_the_end_are_kept(tmp_path: Path) -> None:
    log, num_lines = Log(str(tmp_path)), 4 * (FIRST_BYTES + LAST_BYTES) // LINE_BYTES
    for number in range(num_lines):
        log.add(str(number).encode().ljust(LINE_BYTES - 1) + b"\n")
    log.store()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= FIRST_BYTES + LAST_BYTES + 2 * SEGMENT_BYTES
    segments = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    numbers = [int(line) for line in b"".join(segments).splitlines()]
    assert numbers[: FIRST_BYTES // LINE_BYTES] == list(range(FIRST_BYTES // LINE_BYTES))
    last = LAST_BYTES // LINE_BYTES
    assert numbers[-last:] == list(range(num_lines - last, num_lines))


def test_a_reader_that_is_far_behind_leaves_out_the_middle(tmp_path: Path) -> None:
    file = tmp_path / "out"
    file.write_bytes(b"first\n")
    with file.open("rb") as opened:
        tail = Tail(opened)
        assert (tail.catch_up(), list(tail.lines(to_the_end=False))) == (0, [b"first\n"])
        with file.open("ab") as out:
            out.write(b"left out\n" * 10**6 + b"middle\n" + b"y" * (LAST_BYTES - 2) + b"\n")
        assert tail.catch_up() == 9 * 10**6 + len(b"middle\n")
        assert sum(map(len, tail.lines(to_the_end=True))) >= LAST_BYTES - 1


def test_a_disk_that_fails_for_a_while_loses_no_line(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("the disk fails")
    log = Log(str(tmp_path / "logs" / "driver"))
    log.add(b"one\n")
    log.store()
    (tmp_path / "logs").unlink()
    log.add(b"two\n")
    log.store()
    assert kept(tmp_path / "logs" / "driver") == "one\ntwo\n"


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "db_password"])
def test_values_of_the_environment_are_secret_by_their_names(name: str) -> None:
    assert blank(b"a+b(c)d*e!", patterns_of({name: "a+b(c)d*e"})) == b"***!"
    assert blank(b"short", patterns_of({name: "short"})) == b"short"
    assert blank(b"/work/folder", patterns_of({f"{name}_PATH": "/work/folder"})) == b"/work/folder"


def test_a_storage_that_stays_away_is_told_at_growing_intervals(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").write_text("the disk fails")
    log = Log((tmp_path / "run" / "driver").as_uri())
    log.add(b"a line\n")
    for _ in range(20):
        log.store()
    assert len(caplog.messages) == 5  # the 1st, 2nd, 4th, 8th and 16th
    (tmp_path / "run").unlink()
    log.store()
    assert storage.read_bytes((tmp_path / "run" / "driver" / "000000000000.log").as_uri()) == b"a line\n"
