"""Tests `raydpo usage` against a service whose table of usage the test fills."""

import json
from datetime import UTC, datetime, timedelta

import pytest


@pytest.fixture
def today(database):
    day = datetime.now(UTC).date()
    for age, model in ((0, "tiny"), (1, "tiny"), (1, "ft:a")):
        row = (model, day - timedelta(days=age))
        sums = "num_requests, prompt_tokens, completion_tokens, accelerator_seconds"
        columns = f"project_id, key_id, model_id, day, {sums}"
        database.execute(f"INSERT INTO usage ({columns}) VALUES ('proj_default', 'key_1', %s, %s, 1, 10, 2, 0)", row)
    database.commit()
    yield day
    database.execute("DELETE FROM usage")
    database.commit()


def test_usage_is_shown_by_model_and_day(raydpo, today):
    shown = [line.split("\t") for line in raydpo("usage", "--by", "model").stdout.splitlines()]
    assert shown == [["ft:a", "1", "10", "2", "0.0"], ["tiny", "2", "20", "4", "0.0"]]
    days = json.loads(raydpo("usage", "--from", today, "--json").stdout)
    assert [(each["id"], each["num_requests"]) for each in days] == [(str(today), 1)]
    refused = raydpo("usage", "--from", today, "--to", today - timedelta(days=1))
    assert refused.exit_code == 1
    assert "send a first day that is not after the last day" in refused.stderr
