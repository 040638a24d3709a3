import os
import signal
import subprocess
import sys
import time

import psutil
import psycopg
import pytest

from services.local.postgres import start_postgres, stop_postgres

START = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGTERM, signal.default_int_handler)
from services.local.postgres import start_postgres
start_postgres(Path(sys.argv[1]))
print("started", flush=True)
sys.stdin.read()
"""


def postmaster(folder):
    return int((folder / "postmaster.pid").read_text().splitlines()[0])


def answer(url):
    with psycopg.connect(url) as connection:
        return connection.execute("select 42").fetchone()[0]


@pytest.mark.slow
def test_server_outlives_its_killed_parent_is_adopted_and_stops(home):
    folder = home / "postgres"
    with subprocess.Popen(
        [sys.executable, "-c", START, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout.readline() == b"started\n"
        parent.kill()
    pid = postmaster(folder)
    try:
        assert answer(start_postgres(folder)) == 42
        assert postmaster(folder) == pid
    finally:
        stop_postgres(folder)
    assert not psutil.pid_exists(pid)


@pytest.mark.slow
def test_start_interrupted_anywhere_leaves_no_process_and_the_next_succeeds(home):
    for milliseconds in range(300, 1500, 300):
        folder = home / str(milliseconds) / "postgres"
        folder.parent.mkdir()
        command = [sys.executable, "-c", START, str(folder)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
            time.sleep(milliseconds / 1000)
            parent.send_signal(signal.SIGTERM)
        stop_postgres(folder)
        assert not [p for p in psutil.process_iter(["cmdline"]) if str(folder) in (p.info["cmdline"] or [])]
        try:
            assert answer(start_postgres(folder)) == 42
        finally:
            stop_postgres(folder)


@pytest.mark.slow
def test_pid_file_of_a_dead_server_whose_pid_another_process_has_now_is_overlooked(home):
    folder = home / "postgres"
    start_postgres(folder)
    stop_postgres(folder)
    stale = [str(os.getpid()), str(folder), "1700000000", "5432", str(folder), "", "0 0", "ready"]
    (folder / "postmaster.pid").write_text("\n".join(stale))
    try:
        assert answer(start_postgres(folder)) == 42
    finally:
        stop_postgres(folder)


@pytest.mark.slow
def test_socket_of_a_folder_with_a_long_name_is_closed_to_others(home):
    folder = home / ("long" * 30) / "postgres"
    folder.parent.mkdir()
    try:
        url = start_postgres(folder)
        assert answer(url) == 42
        sockets = os.path.dirname(url.split("host=")[1] + "/")
        assert sockets != str(folder)
        assert os.stat(sockets).st_mode & 0o077 == 0
    finally:
        stop_postgres(folder)
