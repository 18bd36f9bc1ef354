"""The first tables: tasks, inbox, images, outbox, endpoints, deliveries, owners, keys."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("owner", sa.String(length=64), nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.Column("hint", sa.String(length=16), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("revoked_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("hash", name=op.f("uq_api_keys_hash")),
    )
    op.create_table(
        "attempts",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("delivery_id", sa.String(length=40), nullable=False),
        sa.Column("time", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("duration_ms", sa.Integer(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("answer", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_attempts")),
    )
    op.create_index(op.f("ix_attempts_delivery_id"), "attempts", ["delivery_id"], unique=False)
    op.create_table(
        "callbacks",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("task_id", sa.String(length=40), nullable=False),
        sa.Column("owner", sa.String(length=64), nullable=False),
        sa.Column("received_at", sa.BigInteger(), nullable=False),
        sa.Column("last_seen_at", sa.BigInteger(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("verdict", sa.String(length=16), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=True),
        sa.Column("upstream_id", sa.String(length=200), nullable=True),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("first", sa.Boolean(), nullable=True),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_callbacks")),
        sa.UniqueConstraint("task_id", "digest", name=op.f("uq_callbacks_task_id_digest")),
        sa.UniqueConstraint("task_id", "first", name=op.f("uq_callbacks_task_id_first")),
    )
    op.create_table(
        "counters",
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_counters")),
    )
    op.create_table(
        "deliveries",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("owner", sa.String(length=64), nullable=False),
        sa.Column("endpoint_id", sa.String(length=40), nullable=True),
        sa.Column("event_id", sa.String(length=40), nullable=False),
        sa.Column("task_id", sa.String(length=40), nullable=True),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("finished_at", sa.BigInteger(), nullable=True),
        sa.Column("due_at", sa.BigInteger(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("lease_until", sa.BigInteger(), nullable=True),
        sa.Column("lease_owner", sa.String(length=64), nullable=True),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("deaths", sa.Integer(), nullable=False),
        sa.Column("faults", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deliveries")),
    )
    op.create_index(
        "ix_deliveries_deliver_due_at",
        "deliveries",
        ["due_at"],
        unique=False,
        sqlite_where=sa.text("due_at IS NOT NULL AND attempts = 0"),
        postgresql_where=sa.text("due_at IS NOT NULL AND attempts = 0"),
    )
    op.create_index(
        "ix_deliveries_redeliver_due_at",
        "deliveries",
        ["due_at"],
        unique=False,
        sqlite_where=sa.text("due_at IS NOT NULL AND attempts > 0"),
        postgresql_where=sa.text("due_at IS NOT NULL AND attempts > 0"),
    )
    op.create_index(
        op.f("ix_deliveries_endpoint_id_state"),
        "deliveries",
        ["endpoint_id", "state"],
        unique=False,
    )
    op.create_index(op.f("ix_deliveries_event_id"), "deliveries", ["event_id"], unique=False)
    op.create_index(
        op.f("ix_deliveries_owner_created_at_id"),
        "deliveries",
        ["owner", "created_at", "id"],
        unique=False,
    )
    op.create_index(
        "ix_deliveries_deaths",
        "deliveries",
        ["deaths"],
        unique=False,
        sqlite_where=sa.text("deaths > 0"),
        postgresql_where=sa.text("deaths > 0"),
    )
    op.create_index(op.f("ix_deliveries_task_id"), "deliveries", ["task_id"], unique=False)
    op.create_table(
        "endpoints",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("owner", sa.String(length=64), nullable=True),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("types", sa.JSON(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("disabled_at", sa.BigInteger(), nullable=True),
        sa.Column("disabled_reason", sa.Text(), nullable=True),
        sa.Column("failing_since", sa.BigInteger(), nullable=True),
        sa.Column("paused_until", sa.BigInteger(), nullable=True),
        sa.Column("secret", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_endpoints")),
    )
    op.create_index(op.f("ix_endpoints_owner"), "endpoints", ["owner"], unique=False)
    op.create_table(
        "events",
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("owner", sa.String(length=64), nullable=False),
        sa.Column("type", sa.String(length=64), nullable=False),
        sa.Column("task_id", sa.String(length=40), nullable=True),
        sa.Column("terminal", sa.Boolean(), nullable=True),
        sa.Column("time", sa.BigInteger(), nullable=False),
        sa.Column("called_back_at", sa.BigInteger(), nullable=True),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_events")),
        sa.UniqueConstraint("id", name=op.f("uq_events_id")),
        sa.UniqueConstraint("task_id", "terminal", name=op.f("uq_events_task_id_terminal")),
    )
    op.create_index(op.f("ix_events_owner_sequence"), "events", ["owner", "sequence"], unique=False)
    op.create_table(
        "images",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("task_id", sa.String(length=40), nullable=False),
        sa.Column("owner", sa.String(length=64), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("confirmed", sa.Boolean(), nullable=False),
        sa.Column("source_url", sa.Text(), nullable=False),
        sa.Column("link_dies_at", sa.BigInteger(), nullable=False),
        sa.Column("blob", sa.String(length=200), nullable=True),
        sa.Column("media_type", sa.String(length=64), nullable=True),
        sa.Column("bytes", sa.BigInteger(), nullable=True),
        sa.Column("sha256", sa.String(length=64), nullable=True),
        sa.Column("width", sa.Integer(), nullable=True),
        sa.Column("height", sa.Integer(), nullable=True),
        sa.Column("stored_at", sa.BigInteger(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("wrong_sha256", sa.String(length=64), nullable=True),
        sa.Column("wrong_count", sa.Integer(), nullable=False),
        sa.Column("stale_since", sa.BigInteger(), nullable=True),
        sa.Column("stale_count", sa.Integer(), nullable=False),
        sa.Column("at_risk_at", sa.BigInteger(), nullable=True),
        sa.Column("due_at", sa.BigInteger(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("lease_until", sa.BigInteger(), nullable=True),
        sa.Column("lease_owner", sa.String(length=64), nullable=True),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("deaths", sa.Integer(), nullable=False),
        sa.Column("faults", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_images")),
        sa.UniqueConstraint("task_id", "position", name=op.f("uq_images_task_id_position")),
    )
    op.create_index(
        "ix_images_deaths",
        "images",
        ["deaths"],
        unique=False,
        sqlite_where=sa.text("deaths > 0"),
        postgresql_where=sa.text("deaths > 0"),
    )
    op.create_index(
        "ix_images_download_due_at",
        "images",
        ["due_at"],
        unique=False,
        sqlite_where=sa.text("due_at IS NOT NULL"),
        postgresql_where=sa.text("due_at IS NOT NULL"),
    )
    op.create_table(
        "owners",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("callback_secret", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_owners")),
    )
    op.create_table(
        "steps",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("task_id", sa.String(length=40), nullable=False),
        sa.Column("time", sa.BigInteger(), nullable=False),
        sa.Column("step", sa.String(length=40), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_steps")),
    )
    op.create_index(op.f("ix_steps_task_id"), "steps", ["task_id"], unique=False)
    op.create_table(
        "tasks",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("owner", sa.String(length=64), nullable=False),
        sa.Column("upstream", sa.String(length=32), nullable=False),
        sa.Column("upstream_id", sa.String(length=200), nullable=True),
        sa.Column("upstream_id_from", sa.String(length=16), nullable=True),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("upstream_status", sa.String(length=16), nullable=True),
        sa.Column("settled_digest", sa.String(length=64), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("submitted_at", sa.BigInteger(), nullable=True),
        sa.Column("called_back_at", sa.BigInteger(), nullable=True),
        sa.Column("terminal_at", sa.BigInteger(), nullable=True),
        sa.Column("model", sa.String(length=200), nullable=False),
        sa.Column("prompt", sa.Text(), nullable=True),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("callback_url", sa.Text(), nullable=True),
        sa.Column("idempotency_key", sa.String(length=255), nullable=True),
        sa.Column("idempotency_hash", sa.String(length=64), nullable=True),
        sa.Column("progress", sa.Integer(), nullable=False),
        sa.Column("can_cancel", sa.Boolean(), nullable=False),
        sa.Column("estimated_time", sa.Integer(), nullable=True),
        sa.Column("billing_rule", sa.String(length=64), nullable=True),
        sa.Column("user_group", sa.String(length=64), nullable=True),
        sa.Column("credits_reserved", sa.BigInteger(), nullable=True),
        sa.Column("credits_used", sa.BigInteger(), nullable=True),
        sa.Column("error", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("refusal_status", sa.Integer(), nullable=True),
        sa.Column("submit_outcomes", sa.Integer(), nullable=False),
        sa.Column("doubted_at", sa.BigInteger(), nullable=True),
        sa.Column("resubmit", sa.Boolean(), nullable=False),
        sa.Column("settle_requests", sa.Integer(), nullable=False),
        sa.Column("submit_turn", sa.BigInteger(), nullable=False),
        sa.Column("erased_at", sa.BigInteger(), nullable=True),
        sa.Column("submit_due_at", sa.BigInteger(), nullable=True),
        sa.Column("submit_attempts", sa.Integer(), nullable=False),
        sa.Column("submit_lease_until", sa.BigInteger(), nullable=True),
        sa.Column("submit_lease_owner", sa.String(length=64), nullable=True),
        sa.Column("submit_fence", sa.Integer(), nullable=False),
        sa.Column("submit_deaths", sa.Integer(), nullable=False),
        sa.Column("submit_faults", sa.Integer(), nullable=False),
        sa.Column("settle_due_at", sa.BigInteger(), nullable=True),
        sa.Column("settle_attempts", sa.Integer(), nullable=False),
        sa.Column("settle_lease_until", sa.BigInteger(), nullable=True),
        sa.Column("settle_lease_owner", sa.String(length=64), nullable=True),
        sa.Column("settle_fence", sa.Integer(), nullable=False),
        sa.Column("settle_deaths", sa.Integer(), nullable=False),
        sa.Column("settle_faults", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tasks")),
        sa.UniqueConstraint(
            "owner", "idempotency_key", name=op.f("uq_tasks_owner_idempotency_key")
        ),
        sa.UniqueConstraint("upstream_id", "upstream", name=op.f("uq_tasks_upstream_id_upstream")),
    )
    op.create_index(
        op.f("ix_tasks_owner_created_at_id"), "tasks", ["owner", "created_at", "id"], unique=False
    )
    op.create_index(
        "ix_tasks_owner_submit_turn",
        "tasks",
        ["owner", "submit_turn"],
        unique=False,
        sqlite_where=sa.text("submit_due_at IS NOT NULL"),
        postgresql_where=sa.text("submit_due_at IS NOT NULL"),
    )
    op.create_index(
        "ix_tasks_reconcile_due_at",
        "tasks",
        ["settle_due_at"],
        unique=False,
        sqlite_where=sa.text("settle_due_at IS NOT NULL AND settle_requests = 0"),
        postgresql_where=sa.text("settle_due_at IS NOT NULL AND settle_requests = 0"),
    )
    op.create_index(
        "ix_tasks_settle_due_at",
        "tasks",
        ["settle_due_at"],
        unique=False,
        sqlite_where=sa.text("settle_due_at IS NOT NULL AND settle_requests > 0"),
        postgresql_where=sa.text("settle_due_at IS NOT NULL AND settle_requests > 0"),
    )
    op.create_index(
        "ix_tasks_submit_deaths",
        "tasks",
        ["submit_deaths"],
        unique=False,
        sqlite_where=sa.text("submit_deaths > 0"),
        postgresql_where=sa.text("submit_deaths > 0"),
    )
    op.create_index(
        "ix_tasks_settle_deaths",
        "tasks",
        ["settle_deaths"],
        unique=False,
        sqlite_where=sa.text("settle_deaths > 0"),
        postgresql_where=sa.text("settle_deaths > 0"),
    )
    op.create_index(op.f("ix_tasks_state"), "tasks", ["state"], unique=False)
    op.create_index(
        "ix_tasks_submit_due_at",
        "tasks",
        ["submit_turn", "submit_due_at"],
        unique=False,
        sqlite_where=sa.text("submit_due_at IS NOT NULL"),
        postgresql_where=sa.text("submit_due_at IS NOT NULL"),
    )
    op.create_index(
        "ix_tasks_terminal_at",
        "tasks",
        ["terminal_at"],
        unique=False,
        sqlite_where=sa.text("terminal_at IS NOT NULL AND erased_at IS NULL"),
        postgresql_where=sa.text("terminal_at IS NOT NULL AND erased_at IS NULL"),
    )
    op.create_index(
        "ix_images_stored_at",
        "images",
        ["stored_at"],
        unique=False,
        sqlite_where=sa.text("blob IS NOT NULL"),
        postgresql_where=sa.text("blob IS NOT NULL"),
    )
    op.execute(
        "INSERT INTO counters (name, value) VALUES ('events', 0), ('forgotten', 0), ('ready', 0)"
    )
