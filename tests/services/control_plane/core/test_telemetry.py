"""Tests what Prometheus and the log are told, and that neither is told anything private."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from services.control_plane.core import log_setup
from tests.services.control_plane.conftest import API_KEY, pairs


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


def test_no_label_holds_what_is_anybodys(client: openai.OpenAI, base_url: str) -> None:
    file = client.files.create(file=("secret-name.jsonl", pairs()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method={"type": "dpo"})
    client.fine_tuning.jobs.cancel(job.id)
    httpx.get(f"{base_url}/no/such/{job.id}?key={API_KEY}", trust_env=False)
    text = httpx.get(f"{base_url}/metrics", trust_env=False).text
    for canary in (job.id, file.id, "secret-name", "tiny", API_KEY, "key_configured", "/no/such"):
        assert canary not in text


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


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_records_say_what_they_are_about(log_format: log_setup.LogFormat, tmp_path: Path) -> None:
    program = (
        "import logging; from pathlib import Path; from services.control_plane.core import log_setup\n"
        f"log_setup.configure({log_format!r}, Path({str(tmp_path / 'log')!r}))\n"
        "with log_setup.about(request_id='req_1'), log_setup.about(job_id='ftjob-1', attempt=2):\n"
        "    logging.getLogger('a').info('It %s.', 'works', extra={'status': 200})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    if log_format == "text":
        assert done.stderr == ""
        assert (tmp_path / "log").read_text().endswith("INFO a It works. request_id=req_1 job_id=ftjob-1 attempt=2\n")
        return
    line = json.loads(done.stderr)
    assert line.pop("time")
    assert line == {
        "level": "INFO",
        "logger": "a",
        "message": "It works.",
        "request_id": "req_1",
        "job_id": "ftjob-1",
        "attempt": 2,
        "status": 200,
    }
