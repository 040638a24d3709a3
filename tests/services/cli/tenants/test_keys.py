import json

import pytest


@pytest.fixture
def project(raydpo):
    made = raydpo("projects", "create", "team", "--max-queued-jobs", 3, "--max-accelerator-hours", 1.5)
    assert made.exit_code == 0, made.output
    yield made.stdout.strip()
    raydpo("projects", "archive", made.stdout.strip())


@pytest.mark.slow
def test_a_key_is_created_used_listed_and_revoked(raydpo, tmp_path):
    made = raydpo("keys", "create", "ci", "--scope", "read", "--scope", "admin", "--days", 2)
    assert made.exit_code == 0, made.output
    key_id = made.stderr.split(":")[0]
    assert made.stderr == f"{key_id}: read, admin in proj_default\n"
    file = tmp_path / "key"
    file.write_text(made.stdout)
    assert raydpo("files", "list", "--key-file", file).exit_code == 0
    (listed,) = [line for line in raydpo("keys", "list").stdout.splitlines() if key_id in line]
    assert made.stdout.strip() not in listed
    assert listed.split("\t")[1:5] == ["ci", "proj_default", f"rd-…{made.stdout.strip()[-4:]}", "read,admin"]
    assert raydpo("keys", "revoke", key_id).stdout == f"revoked {key_id}\n"
    assert "revoked" in raydpo("keys", "list").stdout
    assert "POST /v1/x/keys/{key_id}/revoke" in raydpo("audit", "--limit", 5).stdout


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
