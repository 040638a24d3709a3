import signal
import time

import httpx
import psutil
import pytest

from services.cli.service import up as serving
from services.local.stack import Stack


def left_of(home):
    commands = {each.pid: " ".join(each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"])}
    return [command for command in commands.values() if str(home) in command]


@pytest.mark.slow
@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT, signal.SIGTERM]])
def test_up_greets_once_it_answers_and_a_signal_stops_all_of_it(up, home, base_model, signals):
    service = up("--model", f"tiny={base_model}", "--model", "qwen=Qwen/Qwen3-0.6B")
    said = service.wait_until_ready()
    assert "base models: tiny, qwen" in said
    assert f"api key: {home}/api.key" in said
    assert f"page: {service.url.removesuffix('v1')} (to sign in, paste what `cat {home}/api.key` prints)" in said
    key = (home / "api.key").read_text()
    assert key.startswith("rd-")
    assert (home / "api.key").stat().st_mode & 0o777 == 0o600
    models = httpx.get(f"{service.url}/models", headers={"Authorization": f"Bearer {key}"}, trust_env=False)
    assert {model["id"] for model in models.json()["data"]} == {"tiny", "qwen"}
    assert service.stop(*signals).endswith("stopped\n")
    assert service.child.returncode == 0
    assert not left_of(home)


@pytest.mark.slow
def test_open_shows_the_page_in_the_browser_and_tells_it_no_key(up, tmp_path, monkeypatch):
    browser, opened = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(f'#!/bin/sh\necho "$@" > {opened}.part && mv {opened}.part {opened}\n')
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    service = up("--open")
    service.wait_until_ready()
    while not opened.exists():
        time.sleep(0.05)
    assert opened.read_text() == f"{service.url.removesuffix('v1')}\n"


@pytest.mark.slow
def test_without_a_browser_open_says_which_address_to_open(up, tmp_path, monkeypatch):
    for name in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    service = up("--open")
    service.wait_until_ready()
    said = service.child.stdout.readline()
    assert said == f"no browser could be opened here; open {service.url.removesuffix('v1')} in yours\n"


@pytest.mark.slow
def test_up_again_after_kill_9_keeps_key_and_files(up, home):
    first = up()
    first.wait_until_ready()
    key = (home / "api.key").read_text()
    client = {"headers": {"Authorization": f"Bearer {key}"}, "trust_env": False}
    row = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    upload = {"files": {"file": ("rows.jsonl", row)}, "data": {"purpose": "fine-tune"}}
    stored = httpx.post(f"{first.url}/files", **upload, **client).json()
    first.stop(signal.SIGKILL)
    second = up()
    second.wait_until_ready()
    assert (home / "api.key").read_text() == key
    assert httpx.get(f"{second.url}/files/{stored['id']}/content", **client).content == row
    second.stop()
    assert not left_of(home)


@pytest.mark.slow
def test_a_second_up_on_the_same_home_is_refused(up, service):
    second = up(home=service.home)
    said, _ = second.child.communicate(timeout=300)
    assert second.child.returncode == 1
    owner = f"The folder {service.home} is used by process {service.child.pid}"
    assert said == f"error: {owner}; stop that process, or choose another --home.\n"


@pytest.mark.slow
def test_a_taken_port_is_refused_before_anything_starts(up, home, service):
    second = up("--port", service.url.split(":")[2].split("/")[0])
    said, _ = second.child.communicate(timeout=300)
    assert second.child.returncode == 1
    assert "Address already in use; choose another --port." in said
    assert not list(home.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("tiny", "must be NAME=SOURCE"),
        ("tiny=./nowhere", "of model 'tiny' is not a folder"),
        ("tiny=/", "holds no config.json"),
        ("ti/ny=Qwen/Qwen3-0.6B", "the model name 'ti/ny' is not valid"),
    ],
)
def test_a_model_that_cannot_be_is_refused_by_name(up, home, model, reason):
    service = up("--model", model)
    said, _ = service.child.communicate(timeout=300)
    assert service.child.returncode == 1
    assert reason in said
    assert "Traceback" not in said
    assert not left_of(home)


def test_a_bucket_that_does_not_exist_is_refused_by_name(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYDPO_STORAGE_URL", f"s3://nobodys/raydpo/{s3.options}")
    stack = Stack(
        database_url="postgresql://nobody/", ray_url="http://127.0.0.1:9", ray_token_file=None, serve_url=None
    )
    with pytest.raises(serving.Refused, match="setting storage_url: The bucket 'nobodys' does not exist"):
        serving._settings(tmp_path, stack, {}, "http://127.0.0.1:9")
