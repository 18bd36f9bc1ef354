"""The metrics. Counters and histograms are this process's. Gauges of the store are set from its
figures when /metrics is read.
"""

from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_type_hints

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

# These series begin at 0, because Prometheus sees no increase in the first value of a series.
VERDICTS = ("accepted", "duplicate", "conflict", "unreadable", "unknown", "wrong_token")
STAGES = (
    *("inbox", "submit", "settle", "reconcile", "download"),
    *("deliver", "redeliver", "replay", "claim"),
)


class Table:
    """Every metric: name without `darkroom_`, kind, meaning, labels."""

    callbacks: Annotated[Counter, "Callbacks by verdict", "verdict"]
    callback_commit_seconds: Annotated[Histogram, "Time from a callback's last byte to its commit"]
    upstream_requests: Annotated[Counter, "Calls to the upstream", "kind", "outcome"]
    upstream_request_seconds: Annotated[Histogram, "Time until the upstream responded", "kind"]
    upstream_limit: Annotated[
        Gauge, "Limit of concurrent calls to the upstream. A 429 halves it", "kind"
    ]
    upstream_credits: Annotated[
        Gauge, "Credits left at the upstream, as last reported. NaN before the first report"
    ]
    downloads: Annotated[Counter, "Downloads of results by outcome", "outcome"]
    download_bytes: Annotated[Counter, "Bytes of stored results"]
    deliveries: Annotated[Counter, "Delivery attempts by outcome", "outcome"]
    delivery_seconds: Annotated[Histogram, "Time until a subscriber responded"]
    callback_to_event_seconds: Annotated[
        Histogram, "Time from the first terminal callback to the terminal event"
    ]
    callback_to_delivery_seconds: Annotated[
        Histogram, "Time from the first terminal callback to the delivery of its event"
    ]
    egress_refused: Annotated[
        Counter, "Outgoing requests that the address guard refused", "purpose"
    ]
    requests_shed: Annotated[Counter, "Client requests answered with 503 under overload"]
    store_failures: Annotated[Counter, "Requests answered with 503 because the store failed"]
    worker_faults: Annotated[Counter, "Unexpected exceptions in workers", "stage"]
    account_refusals: Annotated[
        Counter, "Submissions that the upstream refused because of the service's key or account"
    ]
    account_refused: Annotated[
        Gauge, "1 while the upstream refuses the service's key or account, as this process sees it"
    ]
    submission_paused: Annotated[Gauge, "1 while an operator has paused submission"]
    tasks: Annotated[Gauge, "Tasks by state", "state"]
    queue_depth: Annotated[Gauge, "Rows that wait for work, by stage", "stage"]
    result_seconds_left: Annotated[
        Gauge, "Time left before the first unsaved link expires. +Inf without such a link"
    ]
    oldest_unsettled_seconds: Annotated[Gauge, "Age of the oldest task that is not terminal"]
    oldest_due_delivery_seconds: Annotated[Gauge, "Waiting time of the oldest due delivery"]
    dead_letters: Annotated[Gauge, "Dead deliveries"]
    credits_total: Annotated[
        Gauge, "Credits of all tasks: estimated, reserved, used, refunded", "kind"
    ]
    budget_refusals: Annotated[Counter, "Submissions refused because of a budget"]
    sink_lag: Annotated[
        Gauge,
        "Seconds since the oldest event that the broker has not confirmed. 0 without one",
        "sink",
    ]
    processes: Annotated[Gauge, "Processes that gave a sign of life in the last 30 s", "role"]
    sink_skipped: Annotated[Counter, "Events that the broker refused three times", "sink"]
    blob_free_bytes: Annotated[Gauge, "Free space of the blob store. NaN if unknown"]


class Metrics(Table):
    """The metrics of one process, in a registry of their own."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        for name, kind in get_type_hints(Table, include_extras=True).items():
            metric, text, *labels = get_args(kind)
            buckets = {"buckets": SECONDS} if metric is Histogram else {}
            collector = metric(f"darkroom_{name}", text, labels, registry=self.registry, **buckets)
            setattr(self, name, collector)
        self.upstream_credits.set(float("nan"))
        for verdict in VERDICTS:
            self.callbacks.labels(verdict)
        for stage in STAGES:
            self.worker_faults.labels(stage)

    def show(self, figures: Mapping[str, Any], now: int, free_bytes: int | None) -> bytes:
        """The exposition with the store's `figures` at `now`, in milliseconds."""

        def age(since: int | None) -> float:
            return 0 if since is None else max(0, now - since) / 1000

        for state, count in figures["tasks"].items():
            self.tasks.labels(state).set(count)
        for stage, count in figures["queue_depth"].items():
            self.queue_depth.labels(stage).set(count)
        dies = figures["first_link_dies"]
        self.result_seconds_left.set(float("inf") if dies is None else (dies - now) / 1000)
        self.oldest_unsettled_seconds.set(age(figures["oldest_unsettled"]))
        self.oldest_due_delivery_seconds.set(age(figures["oldest_due_delivery"]))
        self.dead_letters.set(figures["dead_letters"])
        for kind, credits in figures["credits"].items():
            self.credits_total.labels(kind).set(int(credits) / 1_000_000)
        for role, count in figures["processes"].items():
            self.processes.labels(role).set(count)
        for sink, oldest in figures["sinks_behind"].items():
            self.sink_lag.labels(sink).set(age(oldest))
        self.blob_free_bytes.set(float("nan") if free_bytes is None else free_bytes)
        return generate_latest(self.registry)
