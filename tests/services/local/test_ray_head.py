"""Tests the record of a Ray head and its end, with processes that stand in for Ray's."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from services.local import ray_head
from services.local.errors import StackError
from services.local.ray_head import MARK, RayHead, stop_ray

SLEEP = "import time; print('up', flush=True); time.sleep(600)"


def head(folder: Path, mark: str) -> RayHead:
    return RayHead(
        mark=mark,
        folder=str(folder),
        dashboard_port=1,
        agent_port=2,
        serve_port=3,
        ray_version="2",
        python=sys.executable,
    )


def process(*arguments: str, mark: str | None) -> subprocess.Popen[bytes]:
    environment = os.environ | ({MARK: mark} if mark else {})
    child = subprocess.Popen([sys.executable, "-c", SLEEP, *arguments], env=environment, stdout=subprocess.PIPE)
    assert child.stdout
    assert child.stdout.readline() == b"up\n"
    return child


def test_a_head_is_found_again_by_its_record(tmp_path: Path) -> None:
    assert ray_head._read(tmp_path) is None
    made = head(tmp_path / "ray", "a")
    ray_head._write(tmp_path, made)
    assert ray_head._read(tmp_path) == made
    assert json.loads((tmp_path / "stack.json").read_text())["mark"] == "a"
    assert made.url == "http://127.0.0.1:1"


def test_all_that_has_the_mark_ends_with_the_head_its_logs_stay_and_others_live(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "head"
    logs = folder / "ray" / "session_latest" / "logs"
    logs.mkdir(parents=True)
    home.mkdir()
    (logs / "raylet.out").write_text("the end")
    ray_head._write(home, head(folder, "our-mark"))
    ours = [process("--head", mark="our-mark"), process(mark="our-mark")]
    others = [process("--head", mark="another"), process(mark=None)]
    try:
        stop_ray(home)
        assert not [child.pid for child in ours if psutil.pid_exists(child.pid)]
        assert [child.poll() for child in others] == [None, None]
    finally:
        for child in ours + others:
            child.kill()
            child.communicate()
    assert (home / "ray-logs" / "raylet.out").read_text() == "the end"
    assert not folder.exists()
    stop_ray(home)  # there is no head any more


def test_the_head_inherits_no_secret_of_the_control_plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAYDPO_OIDC_CLIENT_SECRET", "raydpo_api_key", "DATABASE_URL", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "a secret")
    for name in ("HF_TOKEN", "RAYDPO_COPIES_BYTES"):
        monkeypatch.setenv(name, "of nodes")
    inherited = ray_head._environment(head(tmp_path, "a"), tmp_path / "token", [1])
    assert "a secret" not in inherited.values()
    assert inherited["HF_TOKEN"] == inherited["RAYDPO_COPIES_BYTES"] == "of nodes"


def test_ports_are_free_and_outside_of_those_that_the_system_gives_away() -> None:
    ports = ray_head._free_ports(20)
    assert len(set(ports)) == 20
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert 20_000 <= min(ports) <= max(ports) < max(lowest, 32_000)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports[0]))
    with pytest.raises(StackError, match="Ray needs 2000 free TCP ports between 20000 and 32000"):
        ray_head._free_ports(2000)
