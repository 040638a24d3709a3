"""Traces by OpenTelemetry. Off, and nothing of it imported, unless OTEL_EXPORTER_OTLP_ENDPOINT is set.

A job outlives the processes that work on it, so its trace is carried as text, a W3C traceparent: stored with the job,
handed to its attempts. Spans of what lasts long are written when they end, from what is known of them then.
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
    """A span around what is done here, below `parent` or the span that is open. None while tracing is off."""
    if not is_on():
        yield None
        return
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract({"traceparent": parent}) if parent else None
    with _provider().get_tracer(SCOPE).start_as_current_span(name, context=context) as opened:
        yield opened


def current() -> str | None:
    """The traceparent of the span that is open here."""
    if not is_on():
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent")


def child(parent: str, key: str) -> str:
    """The traceparent of a span below `parent` that `key` names: the same for all who ask."""
    version, trace_id, _, flags = parent.split("-")
    return "-".join([version, trace_id, hashlib.sha256(key.encode()).hexdigest()[:16], flags])


def record(
    name: str, *, parent: str | None, key: str, start: float, end: float, attributes: Mapping[str, str | int | float]
) -> None:
    """Write the span that `child(parent, key)` stands for, which is over. Times are Unix seconds."""
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
    """Returns when all spans that ended are sent, or cannot be."""
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
