"""Tests the command that lists the audit log."""

import json

import pytest

from services.cli.tenants.audit import _result


def test_changes_and_refusals_are_listed_with_who_made_them_newest_first(raydpo):
    made = raydpo("keys", "create", "audited", "--scope", "read")
    key_id = made.stderr.split(":")[0]
    raydpo("keys", "revoke", key_id)
    raydpo("keys", "revoke", "key_none")
    shown = [line.split("\t")[1:] for line in raydpo("audit", "--limit", 3).stdout.splitlines()]
    assert shown == [
        ["key_configured", "POST /v1/x/keys/{key_id}/revoke", "key_none", "404 key_not_found"],
        ["key_configured", "POST /v1/x/keys/{key_id}/revoke", key_id, "200"],
        ["key_configured", "POST /v1/x/keys", key_id, "200"],
    ]
    newest = json.loads(raydpo("audit", "--limit", 1, "--json").stdout)[0]
    assert (newest["object_id"], newest["code"]) == ("key_none", "key_not_found")


@pytest.mark.parametrize(
    ("code", "number", "shown"),
    [(None, 1, "403"), ("missing_scope", 1, "403 missing_scope"), ("missing_scope", 12, "403 missing_scope, 12 times")],
)
def test_refusals_that_were_counted_together_are_one_line(code, number, shown):
    assert _result({"status": 403, "code": code, "num_requests": number}) == shown
