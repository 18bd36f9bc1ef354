"""The metrics. Counters and histograms are this process's; gauges of the store are counted when
asked.
"""

from collections.abc import Mapping
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Made once a process, with a registry of its own."""

    def __init__(self) -> None:
        # # a second series for each, which nobody asked for
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.callbacks = self._counter("callbacks", "Callbacks by verdict", "verdict")
        self.callback_commit = self._histogram(
            "callback_commit_seconds", "Time from a callback's last byte to its commit"
        )
        self.upstream_requests = self._counter(
            "upstream_requests", "Calls to the upstream", "kind", "outcome"
        )
        self.upstream_seconds = self._histogram(
            "upstream_request_seconds", "Time until the upstream responded", "kind"
        )
        self.upstream_limit = self._gauge(
            "upstream_limit", "Limit of concurrent calls to the upstream. A 429 halves it", "kind"
        )
        self.upstream_credits = self._gauge(
            "upstream_credits",
            "Credits left at the upstream, as last reported. NaN before the first report",
        )
        self.upstream_credits.set(float("nan"))
        self.downloads = self._counter("downloads", "Downloads of results by outcome", "outcome")
        self.download_bytes = self._counter("download_bytes", "Bytes of stored results")
        self.deliveries = self._counter("deliveries", "Delivery attempts by outcome", "outcome")
        self.delivery_seconds = self._histogram(
            "delivery_seconds", "Time until a subscriber responded"
        )
        self.callback_to_event = self._histogram(
            "callback_to_event_seconds",
            "Time from the first terminal callback to the terminal event",
        )
        self.callback_to_delivery = self._histogram(
            "callback_to_delivery_seconds",
            "Time from the first terminal callback to the delivery of its event",
        )
        self.egress_refused = self._counter(
            "egress_refused", "Outgoing requests that the address guard refused", "purpose"
        )
        self.requests_shed = self._counter(
            "requests_shed", "Client requests answered with 503 under overload"
        )
        self.store_failures = self._counter(
            "store_failures", "Requests answered with 503 because the store failed"
        )
        self.worker_faults = self._counter(
            "worker_faults", "Unexpected exceptions in workers", "stage"
        )
        self.account_refusals = self._counter(
            "account_refusals",
            "Submissions that the upstream refused because of the service's key or account",
        )
        self.tasks = self._gauge("tasks", "Tasks by state", "state")
        self.queue_depth = self._gauge("queue_depth", "Rows that wait for work, by stage", "stage")
        self.result_seconds_left = self._gauge(
            "result_seconds_left",
            "Time left before the first unsaved link expires. +Inf without such a link",
        )
        self.oldest_unsettled = self._gauge(
            "oldest_unsettled_seconds", "Age of the oldest task that is not terminal"
        )
        self.oldest_due_delivery = self._gauge(
            "oldest_due_delivery_seconds", "Waiting time of the oldest due delivery"
        )
        self.dead_letters = self._gauge("dead_letters", "Dead deliveries")
        self.credits = self._gauge(
            "credits_total", "Credits of all tasks, reserved or used", "kind"
        )
        self.sink_lag = self._gauge(
            "sink_lag",
            "Seconds since the oldest event that the broker has not confirmed. 0 without one",
            "sink",
        )
        self.blob_free = self._gauge(
            "blob_free_bytes", "Free space of the blob store. NaN if unknown"
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"darkroom_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"darkroom_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(f"darkroom_{name}", text, labels, registry=self.registry, buckets=SECONDS)

    def show(self, figures: Mapping[str, Any], now: int, free_bytes: int | None) -> bytes:
        """The exposition, with the store's `figures` (`queries.figures`) at `now`, in
        milliseconds.
        """
        for state, count in figures["tasks"].items():
            self.tasks.labels(state).set(count)
        for stage, count in figures["queue_depth"].items():
            self.queue_depth.labels(stage).set(count)
        dies, unsettled, due = (
            figures["first_link_dies"],
            figures["oldest_unsettled"],
            figures["oldest_due_delivery"],
        )
        self.result_seconds_left.set(float("inf") if dies is None else (dies - now) / 1000)
        self.oldest_unsettled.set(0 if unsettled is None else max(0, now - unsettled) / 1000)
        self.oldest_due_delivery.set(0 if due is None else max(0, now - due) / 1000)
        self.dead_letters.set(figures["dead_letters"])
        for kind in ("reserved", "used"):
            self.credits.labels(kind).set(figures[f"credits_{kind}"] / 1_000_000)
        for sink, oldest in figures["sinks_behind"].items():
            self.sink_lag.labels(sink).set(0 if oldest is None else max(0, now - oldest) / 1000)
        self.blob_free.set(float("nan") if free_bytes is None else free_bytes)
        return generate_latest(self.registry)
