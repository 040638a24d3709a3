"""Tests traces that several processes write as one, and that nothing is written while tracing is off."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from services import tracing
from tests.services.control_plane.core.test_traces import Collector

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
PROGRAM = f"""
from services import tracing
with tracing.span("outer", parent={PARENT!r}):
    outer = tracing.current()
    with tracing.span("inner"):
        pass
tracing.record("attempt", parent=outer, key="ftjob-1/1", start=10.0, end=12.5, attributes={{"attempt": 1}})
tracing.flush()
print(outer, tracing.child(outer, "ftjob-1/1"))
"""


def test_while_tracing_is_off_spans_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    with tracing.span("a", parent=PARENT) as opened:
        assert opened is None
        assert tracing.current() is None
    tracing.record("b", parent=PARENT, key="k", start=0.0, end=1.0, attributes={})
    tracing.flush()


def test_a_child_is_of_its_parents_trace_and_the_same_for_the_same_key() -> None:
    child = tracing.child(PARENT, "ftjob-1/1")
    version, trace, span, flags = child.split("-")
    assert (version, trace, flags) == ("00", "0af7651916cd43dd8448eb211c80319c", "01")
    assert (len(span), span != "b7ad6b7169203331") == (16, True)
    assert tracing.child(PARENT, "ftjob-1/1") == child != tracing.child(PARENT, "ftjob-1/2")


def test_spans_that_are_open_and_those_that_are_recorded_later_are_one_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    collector = Collector()
    thread = threading.Thread(target=collector.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        folder = Path(__file__).parents[2]
        done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=folder, capture_output=True, text=True, check=True)
    finally:
        collector.shutdown()
        collector.server_close()
        thread.join()
    outer, attempt = (traceparent.split("-")[2] for traceparent in done.stdout.split())
    spans = {span.name: span for span in collector.spans}
    assert {span.trace_id.hex() for span in spans.values()} == {"0af7651916cd43dd8448eb211c80319c"}
    assert (spans["outer"].span_id.hex(), spans["outer"].parent_span_id.hex()) == (outer, "b7ad6b7169203331")
    assert spans["inner"].parent_span_id.hex() == spans["attempt"].parent_span_id.hex() == outer
    assert spans["attempt"].span_id.hex() == attempt
    assert spans["attempt"].end_time_unix_nano - spans["attempt"].start_time_unix_nano == 2_500_000_000
