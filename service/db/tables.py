"""The tables, written once for both stores. Times are milliseconds since 1970 UTC, credits are
millionths of a credit.

State is the queue: a row of work carries lease columns (see `service/db/queues.py`). Every row that
belongs to an owner has an `owner` column.
"""

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    literal_column,
)

# A bound value would not match the condition of a partial index.
ZERO: ColumnElement[int] = literal_column("0")

metadata = MetaData(
    naming_convention={"uq": "uq_%(table_name)s_%(column_0_N_name)s", "pk": "pk_%(table_name)s"}
)


def lease_columns(prefix: str = "") -> list[Column[Any]]:
    """`faults` counts unforeseen exceptions, `deaths` leases that ended by themselves."""
    return [
        Column(f"{prefix}due_at", BigInteger),
        Column(f"{prefix}attempts", Integer, nullable=False, default=0),
        Column(f"{prefix}lease_until", BigInteger),
        Column(f"{prefix}lease_owner", String(64)),
        Column(f"{prefix}fence", Integer, nullable=False, default=0),
        Column(f"{prefix}deaths", Integer, nullable=False, default=0),
        Column(f"{prefix}faults", Integer, nullable=False, default=0),
    ]


owners = Table(
    "owners",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("callback_secret", LargeBinary, nullable=False),  # encrypted
    Column("created_at", BigInteger, nullable=False),
)

tasks = Table(
    "tasks",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("upstream", String(32), nullable=False),
    Column("upstream_id", String(200)),
    # answer (which wins), callback, hand, or query: by hand, and the upstream answered to it
    Column("upstream_id_from", String(16)),
    Column("state", String(16), nullable=False),
    Column("upstream_status", String(16)),
    # Of the report that ended the task. NULL: not ended, or ended by the service itself.
    Column("settled_digest", String(64)),
    Column("created_at", BigInteger, nullable=False),
    Column("submitted_at", BigInteger),
    Column("called_back_at", BigInteger),  # the first terminal callback
    Column("terminal_at", BigInteger),
    Column("model", String(200), nullable=False),
    Column("prompt", Text),
    Column("request", JSON, nullable=False),  # without the prompt
    Column("warnings", JSON(none_as_null=True)),  # NULL: none, as in rows of older versions
    Column("metadata", JSON, nullable=False),
    # Every submission sends these bytes, with the callback token in the place of its hash. They go
    # once the task cannot be submitted any more.
    Column("body", LargeBinary, nullable=False),
    Column("callback_url", Text),  # the client's own
    Column("idempotency_key", String(255)),
    Column("idempotency_hash", String(64)),
    Column("progress", Integer, nullable=False, default=0),
    Column("can_cancel", Boolean, nullable=False, default=True),
    Column("estimated_time", Integer),
    *(Column(name, String(64)) for name in ("billing_rule", "user_group")),
    *(Column(f"credits_{name}", BigInteger) for name in ("reserved", "used", "refunded")),
    Column("credits_estimated", BigInteger),  # by the catalogue
    Column("images_requested", Integer),
    Column("error", JSON(none_as_null=True)),
    Column("refusal_status", Integer),  # HTTP status of the upstream's refusal
    Column("submit_outcomes", Integer, nullable=False, default=0),
    # The first submission that proved nothing: the task may exist and be charged.
    Column("doubted_at", BigInteger),
    # An uncertain task is sent again, by hand or after the first doubt.
    Column("resubmit", Boolean, nullable=False, default=False),
    Column("settle_requests", Integer, nullable=False, default=0),  # requests to settle it now
    # The first time that the upstream had completed the task and named not all of its results.
    Column("incomplete_since", BigInteger),
    Column("inputs", JSON(none_as_null=True)),  # NULL: no input images
    # The task's place among those of its owner and of the other owners.
    Column("submit_turn", BigInteger, nullable=False, default=0),
    Column("erased_at", BigInteger),  # from then on only figures are left
    Column("request_id", String(64)),  # of the submission, and its W3C trace context
    Column("traceparent", String(55)),
    *lease_columns("submit_"),
    *lease_columns("settle_"),
    UniqueConstraint("upstream_id", "upstream"),  # a search knows only the first
    UniqueConstraint("owner", "idempotency_key"),
)

callbacks = Table(
    "callbacks",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("task_id", String(40), nullable=False),
    Column("owner", String(64), nullable=False),
    *(Column(name, BigInteger, nullable=False) for name in ("received_at", "last_seen_at")),
    Column("count", Integer, nullable=False),
    Column("verdict", String(16), nullable=False),
    Column("status", String(16)),  # normalised; NULL: unreadable or undocumented
    Column("upstream_id", String(200)),
    Column("digest", String(64), nullable=False),  # of the outcome, or of an unreadable body
    Column("first", Boolean),  # TRUE on the first terminal callback, else NULL
    Column("body", LargeBinary, nullable=False),
    UniqueConstraint("task_id", "digest"),
    UniqueConstraint("task_id", "first"),
)

# Callbacks that are committed and wait for their verdict. Rows are only inserted and deleted.
inbox = Table(
    "inbox",
    metadata,
    # The order of arrival. A callback that follows the response to another one has a larger number.
    Column("sequence", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("id", String(40), nullable=False),  # the callback's
    Column("task_id", String(40), nullable=False),
    Column("upstream", String(32), nullable=False),  # whose module reads the body
    Column("received_at", BigInteger, nullable=False),
    Column("size", Integer, nullable=False),  # of the body as it came
    Column("digest", String(64), nullable=False),  # of the body as it came
    Column("body", LargeBinary, nullable=False),  # the beginning of a body that is too large
)

images = Table(
    "images",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("task_id", String(40), nullable=False),
    Column("owner", String(64), nullable=False),
    Column("position", Integer, nullable=False),
    Column("state", String(16), nullable=False),  # pending | stored | lost | erased
    Column("confirmed", Boolean, nullable=False),  # FALSE: named by a callback, not yet by a query
    Column("source_url", Text, nullable=False),
    Column("link_dies_at", BigInteger, nullable=False),
    # Of the stored image. While none is stored: of the last body that was no image, in quarantine.
    Column("blob", String(200)),
    Column("media_type", String(64)),
    Column("bytes", BigInteger),
    Column("sha256", String(64)),
    *(Column(name, Integer) for name in ("width", "height")),
    Column("stored_at", BigInteger),
    Column("error", Text),
    Column("wrong_sha256", String(64)),  # of a body that was no image, and how often it came
    Column("wrong_count", Integer, nullable=False, default=0),
    Column("wrong_since", BigInteger),  # when that body came first
    Column("refused_host", String(255)),  # the guard refuses this host of a pending image for now
    Column("stale_since", BigInteger),  # the first 403, 404 or 410, and their number
    Column("stale_count", Integer, nullable=False, default=0),
    Column("at_risk_at", BigInteger),  # of the operators' event
    *lease_columns(),
    UniqueConstraint("task_id", "position"),
)

# Rows: events, ledger and audit (the last sequence), forgotten, ready, and clock, which older
# versions write.
counters = Table(
    "counters",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("value", BigInteger, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("id", String(40), nullable=False, unique=True),
    Column("owner", String(64), nullable=False),
    Column("type", String(64), nullable=False),
    Column("task_id", String(40)),
    Column("terminal", Boolean),  # TRUE on a task's terminal event, else NULL
    Column("time", BigInteger, nullable=False),
    Column("called_back_at", BigInteger),
    Column("traceparent", String(55)),  # of the task
    Column("data", JSON, nullable=False),
    UniqueConstraint("task_id", "terminal"),
)

endpoints = Table(
    "endpoints",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", String(64)),  # NULL: every owner's events
    Column("url", Text, nullable=False),
    Column("types", JSON, nullable=False),
    Column("description", Text, nullable=False),
    Column("status", String(16), nullable=False),  # enabled | paused | disabled
    Column("status_since", BigInteger),  # NULL: since before the column was there
    Column("disabled_at", BigInteger),
    Column("disabled_reason", Text),
    *(Column(name, BigInteger) for name in ("failing_since", "paused_until", "recovered_at")),
    Column("secret", LargeBinary, nullable=False),  # encrypted
    *(Column("options", JSON(none_as_null=True)), Column("headers", LargeBinary)),  # encrypted
    Column("slot_at", BigInteger),  # the next free time of its rate
    Column("created_at", BigInteger, nullable=False),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", String(64), nullable=False),  # the endpoint's, or `admin` for all owners
    Column("endpoint_id", String(40)),  # NULL: the task's own callback_url
    Column("event_id", String(40), nullable=False),
    Column("task_id", String(40)),
    Column("state", String(16), nullable=False),  # pending | delivered | dead
    Column("created_at", BigInteger, nullable=False),
    Column("finished_at", BigInteger),
    *lease_columns(),
    Column("replay_id", String(40)),  # NULL: written with its event
    # Set while the delivery is brought forward: when it was due, or 0 if it was not tried before.
    Column("planned_at", BigInteger),
    # Why the last attempt failed, since when, and when. NULL: it did not, or the event arrived.
    Column("cause", String(64)),
    *(Column(name, BigInteger) for name in ("failed_since", "failed_at")),
    Column("last_status", Integer),  # of the last response
    # Of an ordered endpoint: deliveries of one key go one after another, by `sequence`.
    *(Column("order_key", String(64)), Column("sequence", BigInteger)),
    Column("slot_at", BigInteger),  # the time that the endpoint's rate gave it
)

replays = Table(
    "replays",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", String(64), nullable=False),  # of the request
    Column("endpoint_id", String(40), nullable=False),  # empty: of any endpoint
    # A filter of deliveries. NULL: a replay of an endpoint's events.
    Column("filter", JSON(none_as_null=True)),
    Column("after", String(40)),  # with a filter: the last delivery at the time `position`
    *(Column(name, BigInteger, nullable=False) for name in ("since_at", "until_at")),
    Column("types", JSON, nullable=False),
    Column("only", String(8), nullable=False),  # dead | all
    Column("pending", Boolean),  # TRUE: dead and pending deliveries, which is `undelivered`
    Column("state", String(16), nullable=False),  # running | done | cancelled
    Column("count", BigInteger, nullable=False),  # of events at the start
    Column("made", BigInteger, nullable=False),  # deliveries so far
    Column("position", BigInteger, nullable=False),  # the events from here to `last` follow
    Column("last", BigInteger, nullable=False),
    *(Column("created_at", BigInteger, nullable=False), Column("finished_at", BigInteger)),
    *lease_columns(),
)

sinks = Table(
    "sinks",
    metadata,
    Column("name", String(200), primary_key=True),
    Column("position", BigInteger, nullable=False),  # the broker has the events up to here
    Column("lease_until", BigInteger),
    Column("lease_owner", String(64)),
    Column("fence", Integer, nullable=False),
    Column("seen_at", BigInteger, nullable=False),  # the last attempt to publish
)

attempts = Table(
    "attempts",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("delivery_id", String(40), nullable=False),
    Column("time", BigInteger, nullable=False),
    Column("status", Integer),
    Column("duration_ms", Integer, nullable=False),
    Column("error", Text),
    Column("answer", LargeBinary),  # the first 2 KiB
    Column("endpoint_id", String(40)),  # NULL: of a task's own callback_url, or an old row
)

steps = Table(
    "steps",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("task_id", String(40), nullable=False),
    Column("time", BigInteger, nullable=False),
    Column("step", String(40), nullable=False),
    Column("detail", JSON, nullable=False),
)
