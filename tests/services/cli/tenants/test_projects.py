"""Tests the commands of projects."""

import json

import pytest

from services.cli.tenants.projects import LIMITS, _given, _limits


@pytest.fixture
def project(raydpo):
    made = raydpo("projects", "create", "team", "--max-queued-jobs", 3, "--max-accelerator-hours", 1.5)
    assert made.exit_code == 0, made.output
    yield made.stdout.strip()
    raydpo("projects", "archive", made.stdout.strip())


@pytest.mark.slow
def test_a_project_is_created_limited_listed_and_archived(raydpo, project, tmp_path):
    changed = json.loads(raydpo("projects", "set", project, "--max-queued-jobs", "none", "--max-bytes", 0).stdout)
    assert (changed["max_queued_jobs"], changed["max_bytes"]) == (None, 0)
    (listed,) = [line for line in raydpo("projects", "list").stdout.splitlines() if project in line]
    assert listed.split("\t")[1:] == ["team", "active", "max_bytes=0 max_accelerator_hours=1.5"]
    usage = json.loads(raydpo("projects", "usage", project).stdout)
    assert usage["limits"]["max_bytes"] == {"used": 0, "limit": 0}
    refused = raydpo("projects", "set", project, "--max-bytes", "some")
    assert (refused.exit_code, "some is neither a number nor none" in refused.stderr) == (2, True)
    file = tmp_path / "key"
    file.write_text(raydpo("keys", "create", "theirs", "--project", project).stdout)
    refused = raydpo("keys", "list", "--key-file", file)
    assert refused.stderr.startswith("error: GET /v1/x/keys needs a key with the scope 'admin'")


@pytest.mark.slow
def test_an_archived_project_is_deleted(raydpo):
    project = raydpo("projects", "create", "short-lived").stdout.strip()
    assert "archive it before you delete it" in raydpo("projects", "delete", project).stderr
    raydpo("projects", "archive", project)
    assert raydpo("projects", "delete", project).stdout == f"deleted {project}\n"
    assert project not in raydpo("projects", "list").stdout


def test_only_what_was_given_is_sent_and_none_removes_a_limit():
    assert _given(None, None, None, None, None, None) == {}
    sent = _given("team", 2.0, "3", None, "none", "1.5")
    assert sent == {
        "name": "team",
        "weight": 2.0,
        "max_running_jobs": 3,
        "max_bytes": None,
        "max_accelerator_hours": 1.5,
    }


def test_the_limits_of_a_project_are_one_cell():
    assert _limits(dict.fromkeys(LIMITS)) == "none"
    assert _limits(dict.fromkeys(LIMITS) | {"max_bytes": 0, "max_running_jobs": 2}) == "max_running_jobs=2 max_bytes=0"
