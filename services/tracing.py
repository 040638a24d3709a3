"""Records OpenTelemetry traces of the service. Does nothing unless the environment variable OTEL_EXPORTER_OTLP_ENDPOINT
is set.

A job outlives the processes that work on it. The trace of a job is therefore passed on as text: a W3C traceparent,
which is stored with the job and given to each attempt (one run of the job on Ray). A long span, such as that of an
attempt, is written by `record` when the work has ended.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import Span

SCOPE = "raydpo"


def is_on() -> bool:
    return bool(os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"))


@contextmanager
def span(name: str, *, parent: str | None = None) -> "Iterator[Span | None]":
    """Runs the `with` block in a new span. The block gets the span, or None while tracing is off.

    The new span is a child of the span whose W3C traceparent (a text that identifies a span) is `parent`. If `parent`
    is None, the new span is a child of the span that is open.
    """
    if not is_on():
        yield None
        return
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract({"traceparent": parent}) if parent else None
    with _provider().get_tracer(SCOPE).start_as_current_span(name, context=context) as opened:
        yield opened


def current() -> str | None:
    """Returns the W3C traceparent of the open span, or None if no span is open or tracing is off."""
    if not is_on():
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent")


def child(parent: str, key: str) -> str:
    """Returns the W3C traceparent of a new span below another span, whose traceparent is `parent`. A traceparent is the
    text by which tracing programs identify a span.

    `key` is any text that no other span below `parent` has. The new span's id is made from `key` alone, so equal
    arguments always give the same result.
    """
    version, trace_id, _, flags = parent.split("-")
    return "-".join([version, trace_id, hashlib.sha256(key.encode()).hexdigest()[:16], flags])


def record(
    name: str, *, parent: str | None, key: str, start: float, end: float, attributes: Mapping[str, str | int | float]
) -> None:
    """Writes a span whose work has ended: its name, its times `start` and `end` in Unix seconds, and its attributes.
    The span stands below the span whose traceparent is `parent`. `key` is any text that no other span below `parent`
    has; the span's id is made from it.

    Does nothing if `parent` is None or tracing is off.
    """
    if not is_on() or parent is None:
        return
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    finished = ReadableSpan(
        name,
        context=_context(child(parent, key)),
        parent=_context(parent),
        resource=_provider().resource,
        attributes=attributes,
        instrumentation_scope=InstrumentationScope(SCOPE),
        start_time=int(start * 1e9),
        end_time=int(end * 1e9),
    )
    _processor().on_end(finished)


def flush() -> None:
    """Waits until every finished span is sent or its sending has failed."""
    if is_on():
        _provider().force_flush()


def _context(traceparent: str) -> Any:
    from opentelemetry.trace import SpanContext, TraceFlags

    _, trace_id, span_id, flags = traceparent.split("-")
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))


@cache
def _provider() -> "TracerProvider":
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

    provider = TracerProvider(resource=Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "raydpo")}))
    provider.add_span_processor(_processor())
    return provider


@cache
def _processor() -> "BatchSpanProcessor":
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return BatchSpanProcessor(OTLPSpanExporter())
