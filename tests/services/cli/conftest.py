import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psycopg
import pytest

from tests.services.control_plane.conftest import one_certificate  # noqa: F401  # a command makes a client each time

NO_RAY = "http://127.0.0.1:9"  # nothing answers there: jobs are taken, and wait


class Service:
    """Runs `raydpo up` as a child process. All of the service is real except Ray, which is not there."""

    def __init__(self, home, *options):
        self.home = home
        command = [str(Path(sys.executable).parent / "raydpo"), "up", "--home", str(home), "--ray-address", NO_RAY]
        self.child = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def wait_until_ready(self):
        """Waits until the command has printed that the service is ready, and returns all that it printed."""
        said = ""
        while not said.count("base models:"):
            line = self.child.stdout.readline()
            assert line, said
            said += line
        self.url = re.search(r"^ready (http://127\.0\.0\.1:\d+/v1)$", said, re.MULTILINE)[1]
        return said

    def stop(self, *signals):
        for number in signals or (signal.SIGTERM,):
            self.child.send_signal(number)
            time.sleep(0.05)
        rest, _ = self.child.communicate(timeout=300)
        return rest


@pytest.fixture(scope="session")
def base_model():
    with tempfile.TemporaryDirectory(prefix="raydpo-test-") as folder:
        (Path(folder) / "config.json").write_text("{}")
        yield Path(folder).resolve()


@pytest.fixture
def home():
    """Returns a new home folder for the service.

    It is outside of pytest's folder, which other users cannot enter. PostgreSQL runs as another user if the tests run
    as root.
    """
    with tempfile.TemporaryDirectory(prefix="raydpo-test-", ignore_cleanup_errors=True) as folder:
        yield Path(folder).resolve()


@pytest.fixture
def up(home):
    """Returns a function that starts `raydpo up`, on the test's home folder unless it gets another one.

    At the end of the test, services that still run are killed.
    """
    started = []

    def start(*options, home=home):
        started.append(Service(home, "--port", "0", *options))
        return started[-1]

    yield start
    for service in started:
        if service.child.poll() is None:
            service.stop()


@pytest.fixture(scope="package")
def service(base_model):
    with tempfile.TemporaryDirectory(prefix="raydpo-test-", ignore_cleanup_errors=True) as folder:
        service = Service(Path(folder).resolve(), "--port", "0", "--model", f"tiny={base_model}")
        try:
            service.wait_until_ready()
            yield service
        finally:
            service.stop()


@pytest.fixture
def database(service):
    _, _, _, port, folder, *_ = (service.home / "postgres" / "postmaster.pid").read_text().splitlines()
    with psycopg.connect(host=folder, port=port, user="postgres", dbname="postgres") as connection:
        yield connection


@pytest.fixture
def raydpo(service, monkeypatch):
    """Returns a function that runs the `raydpo` command in this process against the service, and returns its result."""
    from typer.testing import CliRunner

    from services.cli.app import app

    for name in [name for name in os.environ if name.startswith("RAYDPO_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAYDPO_HOME", str(service.home))
    return lambda *arguments, **options: CliRunner().invoke(app, [str(each) for each in arguments], **options)
