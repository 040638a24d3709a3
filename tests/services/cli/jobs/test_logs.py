"""Tests the command that prints a job's logs."""

import pytest


@pytest.mark.slow
def test_a_job_is_paused_and_resumed_and_its_logs_are_printed_and_followed(raydpo, pairs, service):
    job_id = raydpo("jobs", "create", "--model", "tiny", "--file", pairs).stdout.strip()
    assert raydpo("jobs", "pause", job_id).stdout == f"{job_id} paused\n"
    assert raydpo("jobs", "resume", job_id).stdout == f"{job_id} queued\n"
    refused = raydpo("jobs", "resume", job_id)
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert "attempt 1 has no logs of driver; sources that have logs: none" in raydpo("jobs", "logs", job_id).stderr
    logs = service.home / "storage" / "runs" / job_id / "logs"
    for place, text in {"1/driver": "first [bold]\n", "1/worker-0": "step\n", "2/driver": "second\n"}.items():
        (logs / place).mkdir(parents=True)
        (logs / place / "000000000000.log").write_text(text)
    assert raydpo("jobs", "logs", job_id).stdout == "second\n"
    assert raydpo("jobs", "logs", job_id, "--attempt", 1).stdout == "first [bold]\n"
    assert raydpo("jobs", "logs", job_id, "--attempt", 1, "--source", "worker-0").stdout == "step\n"
    assert (
        "attempt 2 has no logs of worker-0; sources that have logs: driver"
        in raydpo("jobs", "logs", job_id, "--source", "worker-0").stderr
    )
    assert "Invalid value for 'source'" in raydpo("jobs", "logs", job_id, "--source", "../driver").stderr
    raydpo("jobs", "cancel", job_id)
    assert raydpo("jobs", "logs", job_id, "--follow").stdout == "second\n"
