import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from services.local.errors import StackError
from services.local.ray_head import processes_with
from services.local.stack import running_stack, write_secret

KILLED = """
import os, signal, sys
from pathlib import Path
from services.local.stack import running_stack
with running_stack(Path(sys.argv[1])) as stack:
    os.kill(os.getpid(), signal.SIGKILL)
"""
# A job that says who it is, and leaves a process behind in a session of its own.
ENTRYPOINT = (
    "python -c \"import os, subprocess, sys; print(sys.executable, os.environ.get('CUDA_VISIBLE_DEVICES'));"
    " subprocess.Popen(['sleep', '600'], start_new_session=True)\""
)


def servers(home, mark):
    """Returns the process ids of PostgreSQL and of the two servers of Ray's head, whose other processes come and go."""
    ray = sorted(process.pid for process in processes_with(mark) if process.name() in ("gcs_server", "raylet"))
    return [int((home / "postgres" / "postmaster.pid").read_text().split()[0]), *ray]


def run_job(stack):
    """Runs a Ray job on the stack until it has succeeded, and returns its logs."""
    token = {"Authorization": f"Bearer {stack.ray_token_file.read_text()}"}
    with httpx.Client(base_url=stack.ray_url, headers=token, trust_env=False, timeout=120) as ray:
        job = ray.post("/api/jobs/", json={"entrypoint": ENTRYPOINT}).json()["submission_id"]
        deadline = time.monotonic() + 300
        while (status := ray.get(f"/api/jobs/{job}").json()["status"]) in ("PENDING", "RUNNING"):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert status == "SUCCEEDED"
        return ray.get(f"/api/jobs/{job}/logs").json()["logs"]


@pytest.mark.ray
def test_stack_outlives_kill_9_is_adopted_runs_jobs_and_stops_to_the_last_process(home):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(home)], check=False)
    assert killed.returncode == -signal.SIGKILL
    record = json.loads((home / "stack.json").read_text())
    before = servers(home, record["mark"])
    assert len(before) == 3
    said = []
    with running_stack(home, say=said.append) as stack:
        assert any("running already" in line for line in said)
        assert servers(home, record["mark"]) == before
        assert stack.ray_url.endswith(str(record["dashboard_port"]))
        assert httpx.get(f"{stack.ray_url}/api/jobs/", trust_env=False).status_code == 401
        assert stack.ray_token_file.stat().st_mode & 0o077 == 0
        assert f"{Path(sys.executable).with_name('python')} None" in run_job(stack)
        assert [p for p in processes_with(record["mark"]) if p.name() == "sleep"]
    assert not processes_with(record["mark"])
    assert not os.path.exists(record["folder"])
    assert not (home / "postgres" / "postmaster.pid").exists()
    assert (home / "ray-logs").is_dir()


def test_one_home_has_one_stack_at_a_time(home):
    parts = {"ray_address": "http://127.0.0.1:8265", "database_url": "postgresql://elsewhere/db"}
    with running_stack(home, **parts) as stack:
        assert stack.ray_url == parts["ray_address"]
        with pytest.raises(StackError, match=f"process {os.getpid()};"), running_stack(home, **parts):
            pass
    with running_stack(home, **parts):
        pass


def test_secret_is_kept_and_readable_by_its_owner_only(home):
    file = write_secret(home / "key", "first")
    assert write_secret(file, "second").read_text() == "first"
    assert file.stat().st_mode & 0o777 == 0o600
