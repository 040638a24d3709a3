"""Tests what Prometheus is told."""

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.services.control_plane.conftest import pairs


def scrape(base_url: str) -> dict[str, float]:
    """Returns the value of each metric by its name and labels, as Prometheus reads them."""
    text = httpx.get(f"{base_url}/metrics", trust_env=False).text
    families = text_string_to_metric_families(text)
    samples = [sample for family in families for sample in family.samples]
    return {f"{each.name}{dict(sorted(each.labels.items()))}": each.value for each in samples}


def test_requests_are_counted_by_route_and_uploads_by_bytes(client: openai.OpenAI, base_url: str) -> None:
    file = client.files.create(file=("secret-name.jsonl", pairs()), purpose="fine-tune")
    before = scrape(base_url)
    client.files.retrieve(file.id)
    client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method={"type": "dpo"})
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="rd-wrong-key").models.list()
    client.files.create(file=("more.jsonl", pairs()), purpose="fine-tune")
    after = scrape(base_url)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    route = {"method": "GET", "route": "/v1/files/{file_id}", "status": "200"}
    assert grown(f"raydpo_http_requests_total{route}") == 1
    del route["status"]
    assert grown(f"raydpo_http_request_seconds_count{route}") == 1
    assert grown("raydpo_auth_failures_total{'code': 'invalid_api_key'}") == 1
    assert grown("raydpo_uploaded_bytes_total{}") == len(pairs())
    assert after["raydpo_database_connections_limit{}"] == 30
    assert after["raydpo_jobs{'state': 'paused'}"] == 0
