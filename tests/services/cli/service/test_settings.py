import json
import os

import pytest
from typer.testing import CliRunner

from services.cli.app import app


@pytest.fixture
def settings(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith(("RAYDPO_", "DATABASE_"))]:
        monkeypatch.delenv(name)
    return lambda *options: CliRunner().invoke(app, ["settings", "--home", str(tmp_path), *options])


def test_each_setting_is_shown_with_its_value_and_where_that_comes_from(settings, monkeypatch, tmp_path):
    (tmp_path / "raydpo.toml").write_text('max_running_jobs = 3\nmax_requests = 9\n[models]\ntiny = "/models/tiny"\n')
    monkeypatch.setenv("RAYDPO_MAX_REQUESTS", "7")
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:a-secret@db.example:5432/raydpo?sslmode=require")
    monkeypatch.setenv("RAYDPO_API_KEY", "rd-a-secret")
    found = settings()
    assert found.exit_code == 0, found.output
    rows = {line.split("\t")[0]: line.split("\t")[1:] for line in found.stdout.splitlines()}
    file = str(tmp_path / "raydpo.toml")
    assert rows["home"] == [str(tmp_path), "--home"]
    assert rows["max_running_jobs"] == ["3", file]
    assert (json.loads(rows["models"][0])["tiny"]["source"], rows["models"][1]) == ("/models/tiny", file)
    assert rows["max_requests"] == ["7", "RAYDPO_MAX_REQUESTS"]
    assert rows["database_url"] == ["postgresql://db.example:5432/raydpo", "DATABASE_URL"]
    assert rows["api_key"] == ["**********", "RAYDPO_API_KEY"]
    assert rows["storage_url"] == ["", "raydpo up"]
    assert rows["reference_dtype"] == ["float32", "default"]
    assert "a-secret" not in found.output
    listed = {each["name"]: each for each in json.loads(settings("--json").stdout)}
    assert (listed["max_requests"]["value"], listed["models"]["value"]["tiny"]["source"]) == (7, "/models/tiny")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max_requests = 0", "setting max_requests: Input should be greater than 0"),
        ("max_request = 1", "setting max_request: Extra inputs are not permitted"),
        ("max_requests =", "Invalid value"),
    ],
)
def test_what_up_would_refuse_is_refused(settings, tmp_path, text, says):
    (tmp_path / "raydpo.toml").write_text(text)
    refused = settings()
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1), refused.output
    assert says in refused.stderr


def test_a_variable_that_is_nearly_a_setting_is_told(settings, monkeypatch):
    monkeypatch.setenv("RAYDPO_MAX_RUNING_JOBS", "3")
    monkeypatch.setenv("RAYDPO_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("RAYDPO_SERVICE_HOST", "10.0.0.1")  # as Kubernetes sets it for a Service of that name
    told = "RAYDPO_MAX_RUNING_JOBS is not a setting and has no effect; did you mean RAYDPO_MAX_RUNNING_JOBS?\n"
    assert settings().stderr == told
