"""Indexes, pairs of metadata and counters for lists, filters and figures.

The triggers come before the rows that count what is there already: on PostgreSQL they lock their
tables until the commit, so that nothing is missed or counted twice.
"""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"

ENDED = "terminal_at IS NOT NULL AND state != 'completed'"
RARE = "type != 'image.task.submitted' AND type != 'image.task.completed'"
INDEXES = (
    ("tasks_model_created_at_id", "tasks", None, "model", "created_at", "id"),
    ("tasks_bad_end", "tasks", ENDED, "state", "created_at", "id"),
    ("tasks_owner_bad_end", "tasks", ENDED, "owner", "state", "created_at", "id"),
    ("tasks_error", "tasks", "error IS NOT NULL", "created_at", "id"),
    ("tasks_owner_error", "tasks", "error IS NOT NULL", "owner", "created_at", "id"),
    ("deliveries_created_at_id", "deliveries", None, "created_at", "id"),
    ("deliveries_endpoint_id_created_at_id", "deliveries", None, "endpoint_id", "created_at", "id"),
    ("deliveries_unfinished", "deliveries", "state != 'delivered'", "state", "created_at", "id"),
    ("deliveries_cause", "deliveries", "cause IS NOT NULL", "cause", "created_at", "id"),
    ("deliveries_refused", "deliveries", "last_status >= 300", "last_status", "created_at", "id"),
    ("events_rare", "events", RARE, "type", "sequence"),
    ("events_owner_rare", "events", RARE, "owner", "type", "sequence"),
    ("ledger_owner_sequence", "ledger", None, "owner", "sequence"),
)

# Processes of schema 0015 need none of these: the first two served schema 0001, and the others are
# the beginnings of `ix_deliveries_{stage}_due_at_owner`.
UNUSED = ("deliver_due_at", "redeliver_due_at", "deliver_next_due_at", "redeliver_next_due_at")

# A task that ends counts once. Its state stays, and its reservation may still change.
BEFORE = "CASE WHEN OLD.terminal_at IS NULL THEN 0 ELSE coalesce(OLD.credits_reserved, 0) END"
NEWLY = "CASE WHEN OLD.terminal_at IS NULL THEN 1 ELSE 0 END"
COUNT = """UPDATE counters SET value = value + CASE name WHEN 'credits reserved'
    THEN coalesce(NEW.credits_reserved, 0) - {before} ELSE {newly} END
    WHERE name IN ('credits reserved', 'tasks ' || NEW.state)"""
COUNT_NEW, COUNT_CHANGED = COUNT.format(before=0, newly=1), COUNT.format(before=BEFORE, newly=NEWLY)
ADD_CREDITS = """UPDATE counters SET value = value + NEW.credits
    WHERE name = 'credits ' || NEW.kind"""
FORGET = "DELETE FROM task_metadata WHERE task_id = NEW.id"
KEEP = """INSERT INTO task_metadata (task_id, owner, created_at, key, value)
    SELECT NEW.id, NEW.owner, NEW.created_at, key, value FROM {pairs}(NEW.metadata)"""
OLD = """INSERT INTO task_metadata (task_id, owner, created_at, key, value)
    SELECT tasks.id, owner, created_at, pair.key, pair.value
    FROM tasks CROSS JOIN {pairs}(tasks.metadata) AS pair WHERE CAST(metadata AS TEXT) != '{{}}'"""
CHANGED = "AFTER UPDATE OF terminal_at, credits_reserved ON tasks"
COUNTERS = (
    """INSERT INTO counters (name, value) SELECT 'tasks ' || ended.state,
    (SELECT count(*) FROM tasks WHERE tasks.state = ended.state)
    FROM (SELECT 'completed' AS state UNION ALL SELECT 'failed' UNION ALL SELECT 'cancelled'
    UNION ALL SELECT 'expired') AS ended""",
    """INSERT INTO counters (name, value) SELECT 'credits ' || entry.kind,
    coalesce((SELECT sum(credits) FROM ledger WHERE ledger.kind = entry.kind), 0)
    FROM (SELECT 'estimate' AS kind UNION ALL SELECT 'charge' UNION ALL SELECT 'refund'
    UNION ALL SELECT 'adjust') AS entry""",
    """INSERT INTO counters (name, value) SELECT 'credits reserved',
    coalesce(sum(credits_reserved), 0) FROM tasks WHERE terminal_at IS NOT NULL""",
)

SQLITE = (
    ("tasks_ended", f"{CHANGED} WHEN NEW.terminal_at IS NOT NULL", COUNT_CHANGED),
    ("tasks_new_ended", "AFTER INSERT ON tasks WHEN NEW.terminal_at IS NOT NULL", COUNT_NEW),
    ("ledger_credits", "AFTER INSERT ON ledger", ADD_CREDITS),
    (
        "tasks_metadata",
        "AFTER INSERT ON tasks WHEN NEW.metadata != '{}'",
        KEEP.format(pairs="json_each"),
    ),
    (
        "tasks_metadata_changed",
        "AFTER UPDATE OF metadata ON tasks",
        f"{FORGET}; {KEEP.format(pairs='json_each')}",
    ),
)
# The counters of ended tasks are raised at the commit, after the row of the events is locked, which
# such a transaction has locked already in nearly every case. So no two transactions wait for each
# other.
FUNCTIONS = (
    (
        "count_ended",
        f"""PERFORM 1 FROM counters WHERE name = 'events' FOR UPDATE;
    IF TG_OP = 'INSERT' THEN {COUNT_NEW};
    ELSIF OLD.terminal_at IS NULL OR OLD.credits_reserved IS DISTINCT FROM NEW.credits_reserved
    THEN {COUNT_CHANGED}; END IF;""",
    ),
    ("add_credits", f"{ADD_CREDITS};"),
    (
        "keep_metadata",
        f"IF TG_OP = 'UPDATE' THEN {FORGET}; END IF; {KEEP.format(pairs='json_each_text')};",
    ),
)
ENDS = "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (NEW.terminal_at IS NOT NULL)"
POSTGRESQL = (
    ("count_ended", f"CONSTRAINT TRIGGER tasks_ended {CHANGED} {ENDS}"),
    ("count_ended", f"CONSTRAINT TRIGGER tasks_new_ended AFTER INSERT ON tasks {ENDS}"),
    ("add_credits", "TRIGGER ledger_credits AFTER INSERT ON ledger FOR EACH ROW"),
    (
        "keep_metadata",
        """TRIGGER tasks_metadata AFTER INSERT ON tasks FOR EACH ROW
    WHEN (CAST(NEW.metadata AS text) != '{}')""",
    ),
    (
        "keep_metadata",
        "TRIGGER tasks_metadata_changed AFTER UPDATE OF metadata ON tasks FOR EACH ROW",
    ),
)


def upgrade() -> None:
    for name, table, where, *columns in INDEXES:
        condition = None if where is None else sa.text(where)
        op.create_index(
            f"ix_{name}",
            table,
            columns,
            unique=False,
            sqlite_where=condition,
            postgresql_where=condition,
        )
    for name in UNUSED:
        op.drop_index(f"ix_deliveries_{name}", "deliveries")
    op.create_table(
        "task_metadata",
        sa.Column("task_id", sa.String(length=40), nullable=False),
        sa.Column("owner", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
    )
    pair = ["key", "value", "created_at", "task_id"]
    op.create_index(op.f("ix_task_metadata_task_id"), "task_metadata", ["task_id"])
    op.create_index("ix_task_metadata_pair", "task_metadata", pair)
    op.create_index("ix_task_metadata_owner_pair", "task_metadata", ["owner", *pair])
    sqlite = op.get_bind().dialect.name == "sqlite"
    (_triggers_of_sqlite if sqlite else _triggers_of_postgresql)()
    op.execute(OLD.format(pairs="json_each" if sqlite else "json_each_text"))
    for statement in COUNTERS:
        op.execute(statement)


def _triggers_of_sqlite() -> None:
    for name, when, body in SQLITE:
        op.execute(f"CREATE TRIGGER {name} {when} BEGIN {body}; END")


def _triggers_of_postgresql() -> None:
    for name, body in FUNCTIONS:
        form = "CREATE FUNCTION darkroom_{}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {} {}"
        op.execute(form.format(name, body, "RETURN NULL; END $$"))
    for name, trigger in POSTGRESQL:
        op.execute(f"CREATE {trigger} EXECUTE FUNCTION darkroom_{name}()")
