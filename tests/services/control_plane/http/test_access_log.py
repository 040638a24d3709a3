"""Tests the ids of requests and the access log."""

import logging

import httpx
import pytest

from tests.services.control_plane.conftest import API_KEY


def test_a_client_may_name_its_request_and_every_answer_has_an_id(
    base_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="services.control_plane.http.access_log"):
        headers = {"Authorization": f"Bearer {API_KEY}", "X-Client-Request-Id": "mine-1"}
        answer = httpx.get(f"{base_url}/v1/models?secret=canary", headers=headers, trust_env=False)
        assert httpx.get(f"{base_url}/v1/nowhere", trust_env=False).headers["x-request-id"].startswith("req_")
    assert answer.headers["x-request-id"].startswith("req_")
    (line,) = [record for record in caplog.records if vars(record).get("route") == "/v1/models"]
    assert vars(line)["key_id"] == "key_configured"
    assert (vars(line)["method"], vars(line)["status"]) == ("GET", 400)  # the query is none of the route
    assert "canary" not in caplog.text
    assert API_KEY not in caplog.text
