import pytest


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
