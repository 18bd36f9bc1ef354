"""Traces by W3C Trace Context: a task keeps the `traceparent` of its client's request, and every
call in the task's name passes one on.

With the extra `otel` and the standard OTEL_* variables, `span` also records spans. Without them
nothing of OpenTelemetry is imported, and the client's own `traceparent` is passed on as it came.
"""

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import structlog
from structlog.contextvars import bind_contextvars, get_contextvars, reset_contextvars

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

# version "-" trace-id "-" parent-id "-" flags. A later version may add further fields.
FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)
FRESH_MS = 3_600_000  # later work on an event is a trace of its own, with a link to the event's
ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
NOTHING: Mapping[str, Any] = MappingProxyType({})

log = structlog.get_logger()

_current: ContextVar[str | None] = ContextVar("traceparent", default=None)
_tracer: "Tracer | None" = None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the work on a task comes from: the upstream's id, the request that submitted it, and
    the trace of that request.
    """

    upstream_id: str | None = None
    request_id: str | None = None
    traceparent: str | None = None

    @property
    def ids(self) -> dict[str, str]:
        """The fields of a log line, as far as they are known."""
        trace_id = self.traceparent and self.traceparent[3:35]
        ids = {"request_id": self.request_id, "trace_id": trace_id}
        return {name: id for name, id in {**ids, "upstream_id": self.upstream_id}.items() if id}


NO_ORIGIN = Origin()


@dataclass(slots=True)
class Recorded:
    """A span that may be under way. `set` adds attributes."""

    span: "Span | None" = None

    def set(self, **attributes: Any) -> None:
        if self.span is not None:
            self.span.set_attributes(_named(attributes))

    def rename(self, name: str) -> None:
        if self.span is not None:
            self.span.update_name(name)

    def fail(self, reason: str) -> None:
        """Marks the span as failed. `error.type` is one word of few."""
        if self.span is not None:
            from opentelemetry.trace import Status, StatusCode

            self.span.set_attribute("error.type", reason)
            self.span.set_status(Status(StatusCode.ERROR))


def valid_traceparent(header: str | None) -> str | None:
    """The header as version 00. None: it is missing or breaks the rules of W3C Trace Context."""
    if header is None or (match := FORM.fullmatch(header.strip(" \t"))) is None:
        return None
    version, trace, parent, flags, more = match.groups()
    if version == "ff" or (version == "00" and more) or not int(trace, 16) or not int(parent, 16):
        return None
    bits = flags if version == "00" else f"{int(flags, 16) & 1:02x}"  # "sampled" stays what it is
    return f"00-{trace}-{parent}-{bits}"


def current() -> str | None:
    """The `traceparent` of calls that this context makes."""
    return _current.get()


def enter(traceparent: str | None) -> None:
    """Works in a trace from now on, in this context. Its log lines have the `trace_id`."""
    _current.set(traceparent)
    if traceparent is not None:
        bind_contextvars(trace_id=traceparent[3:35])


@contextmanager
def span(
    name: str,
    kind: str = "internal",
    parent: str | None = None,
    *,
    linked: bool = False,
    started_s: float | None = None,
    attributes: Mapping[str, Any] = NOTHING,
) -> Iterator[Recorded]:
    """One span, and the trace of all calls within it. `parent` None: that of this context.
    `linked`: a new trace, with a link to the parent. `started_s`: seconds ago, for a span whose
    trace became known late.
    """
    before = current()
    parent = parent or before
    recorded = Recorded()
    traceparent = parent
    if _tracer is not None:
        recorded.span = _start(_tracer, name, kind, parent, linked, started_s, attributes)
        context = recorded.span.get_span_context()
        flags = int(context.trace_flags)
        traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{flags:02x}"
    _current.set(traceparent)
    tokens = bind_contextvars(trace_id=traceparent[3:35]) if traceparent else {}
    try:
        yield recorded
    except BaseException as error:
        recorded.fail(type(error).__name__)
        raise
    finally:
        _current.set(before)
        reset_contextvars(**tokens)
        if recorded.span is not None:
            recorded.span.end()


def record(name: str, kind: str, origin: Origin, seconds: float) -> None:
    """A span that ends now, for a step whose task became known late."""
    if _tracer is not None:
        with span(name, kind, origin.traceparent, started_s=seconds):
            pass


def _start(
    tracer: "Tracer",
    name: str,
    kind: str,
    parent: str | None,
    linked: bool,
    started_s: float | None,
    attributes: Mapping[str, Any],
) -> "Span":
    from opentelemetry.context import Context
    from opentelemetry.trace import Link, SpanKind, set_span_in_context

    context, links = Context(), list[Link]()
    if parent is not None and linked:
        links = [Link(_context_of(parent).get_span_context())]
    elif parent is not None:
        context = set_span_in_context(_context_of(parent), context)
    begin = None if started_s is None else time.time_ns() - round(started_s * 1e9)
    return tracer.start_span(
        name, context, SpanKind[kind.upper()], _named(attributes), links, begin
    )


def _context_of(traceparent: str) -> "Span":
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

    _, trace, parent, flags = traceparent.split("-")
    remote = SpanContext(int(trace, 16), int(parent, 16), True, TraceFlags(int(flags, 16)))
    return NonRecordingSpan(remote)


def _named(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes without unknown values."""
    return {name: value for name, value in attributes.items() if value is not None}


def work_for(origin: Origin, **ids: str | None) -> None:
    """From now on this context works for a task. Every line of its log has the task's ids, so that
    each of them alone finds all lines of the task.
    """
    bind_contextvars(**_named(ids), **origin.ids)
    _current.set(origin.traceparent)


def request_id() -> str | None:
    """The id of the request that this context answers."""
    return get_contextvars().get("request_id")


def message_attributes(
    system: str, to: str, id: str, type: str, subject: str | None
) -> dict[str, Any]:
    """Of an event, by the semantic conventions for messaging and for CloudEvents."""
    return {
        "messaging.system": system,
        "messaging.operation.type": "send",
        "messaging.operation.name": "send",
        "messaging.destination.name": to,
        "messaging.message.id": id,
        "cloudevents.event_id": id,
        "cloudevents.event_type": type,
        "cloudevents.event_spec_version": "1.0",
        "cloudevents.event_subject": subject,
    }


# --- switching on


def wanted(environ: Mapping[str, str]) -> bool:
    """Whether the standard variables switch traces on."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    return exporter == "otlp" or (not exporter and any(environ.get(name) for name in ENDPOINTS))


@contextmanager
def tracing(version: str) -> Iterator[None]:
    """Exports spans until the end of the block, if the variables ask for them."""
    if not wanted(os.environ):
        yield
        return
    try:
        provider = _exporting(version)
    except ImportError:
        log.warning("traces.unavailable", extra="otel")
        yield
        return
    with recording(provider):
        yield
    provider.shutdown()


def _exporting(version: str) -> "TracerProvider":
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    usual = {"service.name": os.environ.get("OTEL_SERVICE_NAME") or "darkroom"}
    named = Resource.create({"service.version": version} | usual)
    provider = TracerProvider(resource=named)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


@contextmanager
def recording(provider: "TracerProvider") -> Iterator[None]:
    """Records the spans of this process with a provider."""
    global _tracer  # noqa: PLW0603 - one per process, like the logger
    before, _tracer = _tracer, provider.get_tracer("darkroom")
    try:
        yield
    finally:
        _tracer = before
