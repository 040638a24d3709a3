import json
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

PAIR = {"prompt": "Do you have a red saw?", "chosen": "Yes, gladly!", "rejected": "Aisle 3."}
CSV = "step,train_loss\n1,0.69\n2,0.5\n"
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


@pytest.fixture
def pairs(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text((json.dumps(PAIR) + "\n") * 20)
    return file


@pytest.fixture
def job_id(raydpo):
    made = raydpo("jobs", "create", "--model", "tiny", "--file", "hf://datasets/org/name/[/red]/a.jsonl").stdout.strip()
    yield made
    raydpo("jobs", "cancel", made)


@pytest.fixture
def trained(raydpo, database, job_id, tmp_path):
    """Adds to a job what its training would have reported: two steps, a checkpoint, and a result file."""
    metrics = {1: {"train_loss": 0.69, "learning_rate": 1e-6}, 2: {"train_loss": 0.5, "train_reward_accuracy": 0.75}}
    for step, told in metrics.items():
        event = (f"ftevent-{job_id}-{step}", job_id, step, step, f"Step {step}/2", json.dumps(told | {"step": step}))
        columns = "public_id, job_id, attempt, seq, step, level, type, message, data"
        database.execute(f"INSERT INTO events ({columns}) VALUES (%s, %s, 1, %s, %s, 'info', 'metrics', %s, %s)", event)
    saved = (f"ftckpt-{job_id}", job_id, "file:///nowhere", f"ft:tiny:raydpo::{job_id[6:]}", json.dumps({"loss": 0.5}))
    columns = "id, job_id, step, uri, model_id, metrics"
    database.execute(f"INSERT INTO checkpoints ({columns}) VALUES (%s, %s, 2, %s, %s, %s)", saved)
    model = (saved[3], saved[2], job_id)
    columns = "id, source, root, project_id, job_id"
    database.execute(f"INSERT INTO models ({columns}) VALUES (%s, %s, 'tiny', 'proj_default', %s)", model)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    result = raydpo("files", "upload", rows).stdout.strip()
    database.execute("UPDATE jobs SET result_file = %s WHERE id = %s", (result, job_id))
    database.commit()
    yield job_id, saved[3]
    database.execute("UPDATE models SET deleted_at = now() WHERE id = %s", (saved[3],))
    database.commit()
