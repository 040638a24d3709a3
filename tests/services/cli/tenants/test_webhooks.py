"""Tests the commands of webhooks."""


def test_webhooks_are_created_listed_tested_and_deleted(raydpo):
    created = raydpo("webhooks", "create", "https://127.0.0.1:9/")
    assert created.exit_code == 1
    assert "127.0.0.1, which is not public" in created.stderr
    created = raydpo("webhooks", "create", "https://localhost:9/", "--name", "ours")
    assert created.stderr.startswith("signing secret: whsec_")
    endpoint_id = created.stdout.strip()
    (row,) = raydpo("webhooks", "list").stdout.splitlines()
    kinds = " ".join(f"eval.run.{state}" for state in ("canceled", "failed", "succeeded"))
    kinds += "".join(f" fine_tuning.job.{state}" for state in ("cancelled", "failed", "succeeded"))
    assert row.split("\t") == [endpoint_id, "ours", "https://localhost:9/", kinds, "enabled"]
    refused = raydpo("webhooks", "test", endpoint_id)
    assert refused.exit_code == 1
    assert "could not be reached" in refused.stderr
    assert raydpo("webhooks", "delete", endpoint_id).exit_code == 0
    assert raydpo("webhooks", "list").stdout == ""
