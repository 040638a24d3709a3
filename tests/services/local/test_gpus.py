"""Tests what `raydpo up` chooses on a machine with GPUs. A script on the PATH takes the place of nvidia-smi."""

import json

import pytest
from typer.testing import CliRunner

from services.cli.app import app
from services.cli.service import up
from services.local import gpus
from services.local.stack import Stack

TWO = 'echo "GPU 0: NVIDIA H200 (UUID: GPU-1)"; echo "GPU 1: NVIDIA H200 (UUID: GPU-2)"'
BOTH = {"num_gpus_per_worker": 1.0, "num_gpus_per_model": 1.0}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Returns a function that puts a script in the place of nvidia-smi."""
    monkeypatch.setattr(gpus, "version", lambda name: "2.9.0")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in gpus.NAMES:
        monkeypatch.delenv(f"RAYDPO_{name.upper()}", raising=False)

    def make(script):
        file = tmp_path / "nvidia-smi"
        file.write_text(f'#!/bin/sh\n[ "$1" = -L ] || exit 2\n{script}\n')
        file.chmod(0o755)

    return make


def test_workers_and_models_get_a_whole_gpu_each_and_it_is_told(machine):
    machine(TWO)
    words = (
        "GPUs on this machine: 2, so num_gpus_per_worker is 1 and num_gpus_per_model is 1; "
        "to change this, set num_gpus_per_worker or num_gpus_per_model"
    )
    assert gpus.defaults([]) == (BOTH, words)


def test_what_the_settings_say_stays(machine):
    machine(TWO)
    chosen, words = gpus.defaults(["num_gpus_per_worker"])
    assert chosen == {"num_gpus_per_model": 1.0}
    assert words == "GPUs on this machine: 2, so num_gpus_per_model is 1; to change this, set num_gpus_per_model"
    assert gpus.defaults(gpus.NAMES) == ({}, "")


@pytest.mark.parametrize("script", ["exit 9", 'echo "No devices found."', "kill -9 $$"])
def test_a_driver_that_finds_none_or_fails_is_no_gpu(machine, script):
    machine(script)
    assert gpus.defaults([]) == ({}, "")


def test_without_the_driver_there_is_no_gpu(machine, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.defaults([]) == ({}, "")


def test_the_builds_for_cpus_use_no_gpu(machine, monkeypatch):
    machine(TWO)
    monkeypatch.setattr(gpus, "version", lambda name: "2.9.0+cpu")
    assert gpus.defaults([]) == ({}, "")


@pytest.mark.parametrize(("visible", "number"), [("", 0), ("-1", 0), ("NoDevFiles", 0), ("1", 1), ("0,1,2", 2)])
def test_what_cuda_visible_devices_hides_is_not_there(machine, monkeypatch, visible, number):
    machine(TWO)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus.defaults([])[1].startswith(f"GPUs on this machine: {number}," if number else "")
    assert bool(gpus.defaults([])[0]) == bool(number)


@pytest.mark.parametrize("starts_ray", [True, False])
def test_up_gives_them_to_a_ray_that_it_starts(machine, tmp_path, capsys, monkeypatch, starts_ray):
    machine(TWO)
    (tmp_path / "ray.token").write_text("token")
    (tmp_path / "raydpo.toml").write_text("num_gpus_per_model = 0.5\n")
    stack = Stack(
        database_url="postgresql://h/d",
        ray_url="http://127.0.0.1:9",
        ray_token_file=tmp_path / "ray.token" if starts_ray else None,
        serve_url=None,
    )
    settings = up._settings(tmp_path, stack, {}, "http://127.0.0.1:8000")
    assert (settings.num_gpus_per_worker, settings.num_gpus_per_model) == (1.0 if starts_ray else 0.0, 0.5)
    assert ("num_gpus_per_worker is 1" in capsys.readouterr().out) == starts_ray


def test_raydpo_settings_shows_them(machine, tmp_path):
    machine(TWO)
    listed = CliRunner().invoke(app, ["settings", "--home", str(tmp_path), "--json"])
    found = {each["name"]: (each["value"], each["source"]) for each in json.loads(listed.stdout)}
    assert [found[name] for name in gpus.NAMES] == [(1.0, "raydpo up")] * 2
