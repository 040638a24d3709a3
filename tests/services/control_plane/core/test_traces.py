"""Tests the trace of a job, from a client's request to the steps of its attempt, as an OpenTelemetry collector gets
it."""

import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from services import storage
from services.contract import AttemptSpec, CheckpointSaved, Progress, StepMetrics, Succeeded
from services.control_plane.core.store import migrate
from services.control_plane.settings import Settings
from services.training.reports.reporting import Reporter
from tests.services.control_plane.conftest import API_KEY, FakeRay, free_port, pairs

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"Authorization": f"Bearer {API_KEY}"}
STEPS = 150
PROGRAM = """
import os
from services.control_plane.app import create_app
from services.control_plane.http.server import Server
from services.control_plane.settings import Settings

Server(create_app(Settings()), host="127.0.0.1", port=int(os.environ["PORT"]), log_level="warning").run()
"""


class Collector(ThreadingHTTPServer):
    """Receives OTLP over HTTP, and keeps the spans."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["content-length"]))
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for scope in resource.scope_spans:
                        spans.extend(scope.spans)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                return

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    server = Collector()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def service(offline: Settings, fake_ray: FakeRay, collector: Collector) -> Iterator[str]:
    migrate(offline.database_url)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | {
        "PORT": str(port),
        "DATABASE_URL": offline.database_url,
        "RAYDPO_HOME": str(offline.home),
        "RAYDPO_STORAGE_URL": offline.storage_url,
        "RAYDPO_API_KEY": API_KEY,
        "RAYDPO_ADVERTISED_URL": url,
        "RAYDPO_RAY_URL": f"http://127.0.0.1:{fake_ray.server.server_port}",
        "RAYDPO_MODELS": '{"tiny": "/nowhere/tiny"}',
    }
    child = subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, cwd=Path(__file__).parents[4])
    with httpx.Client(base_url=url, trust_env=False, timeout=120) as http:
        deadline = time.monotonic() + 300
        while True:
            try:
                http.get("/readyz").raise_for_status()
                break
            except httpx.HTTPError:
                assert child.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
    yield url
    child.terminate()
    child.wait()


def until(condition: object, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_trace_leads_from_the_request_over_the_attempt_to_its_steps(
    service: str, fake_ray: FakeRay, collector: Collector
) -> None:
    with httpx.Client(base_url=f"{service}/v1", headers=HEADERS, trust_env=False, timeout=120) as http:
        upload = {"file": ("pairs.jsonl", pairs())}
        file = http.post("/files", files=upload, data={"purpose": "fine-tune"}).json()["id"]
        body = {"model": "tiny", "training_file": file, "method": {"type": "dpo"}}
        traced = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
        job_id = http.post("/fine_tuning/jobs", json=body, headers=traced).json()["id"]
        until(lambda: f"{job_id}-1" in fake_ray.jobs)
        (submission,) = [each for each in fake_ray.submissions if each["submission_id"] == f"{job_id}-1"]
        spec_uri = shlex.split(submission["entrypoint"])[-1]
        spec = AttemptSpec.model_validate_json(storage.read_bytes(spec_uri))
        reporter = Reporter(spec, submission["runtime_env"]["env_vars"]["RAYDPO_ATTEMPT_TOKEN"], period_seconds=0.1)
        reporter.report(Progress(stage="encoding", done=0, total=12))
        reporter.report(Progress(stage="encoding", done=12, total=12))
        for step in range(1, STEPS + 1):
            reporter.report(StepMetrics(step=step, total_steps=STEPS, metrics={"loss": 0.5}))
        saved = storage.join(spec.run_uri, "checkpoints", "step-000150")
        reporter.report(CheckpointSaved(step=STEPS, uri=saved, metrics={"loss": 0.5}))
        reporter.report(Succeeded(model_uri=storage.join(spec.run_uri, "export"), trained_tokens=1))
        assert reporter.close(300)
        fake_ray.jobs[f"{job_id}-1"] = "SUCCEEDED"
        until(lambda: http.get(f"/fine_tuning/jobs/{job_id}").json()["status"] == "succeeded")

    def own() -> dict[str, list[Span]]:
        found: dict[str, list[Span]] = {}
        for span in collector.spans:
            if span.trace_id.hex() == TRACE:
                found.setdefault(span.name, []).append(span)
        return found

    until(lambda: "attempt" in own())
    spans = own()
    assert sorted(spans) == ["POST /v1/fine_tuning/jobs", "attempt", "encoding", "submit job", "training"]
    (request,), (submit,), (attempt,) = spans["POST /v1/fine_tuning/jobs"], spans["submit job"], spans["attempt"]
    assert request.parent_span_id.hex() == CALLER
    assert submit.parent_span_id == request.span_id
    assert attempt.parent_span_id == submit.span_id
    training = sorted(spans["training"], key=lambda span: span.start_time_unix_nano)
    ranges = [{each.key: each.value.int_value for each in span.attributes} for span in training]
    assert ranges == [{"raydpo.first": 1, "raydpo.last": 100}, {"raydpo.first": 101, "raydpo.last": 150}]
    for span in [*spans["encoding"], *training]:
        assert span.parent_span_id == attempt.span_id
        assert attempt.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= attempt.end_time_unix_nano


@pytest.mark.slow
def test_nothing_of_opentelemetry_is_imported_while_it_is_off() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    program = (
        "import sys; from services import tracing\n"
        "import services.control_plane.app, services.training.reports.reporting\n"
        "with tracing.span('a') as span: print(span, tracing.current())\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "None None\n[]\n"
