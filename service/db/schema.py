"""The schema's version: brought up to date under a lock, and refused when it is newer than this
program.
"""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect

from service.errors import ConfigurationError


def config(connection: Connection | None = None) -> Config:
    """Alembic's configuration; there is no ini file, the connection comes from whoever migrates."""
    made = Config()
    made.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    made.attributes["connection"] = connection
    return made


def refuse_foreign(connection: Connection) -> None:
    """ConfigurationError: the database is somebody else's."""
    if (
        MigrationContext.configure(connection).get_current_revision() is None
        and inspect(connection).get_table_names()
    ):
        raise ConfigurationError(
            "the database holds tables that are not darkroom's: DARKROOM_DATABASE_URL must name"
            " one of its own"
        )


def migrate(connection: Connection, *, allowed: bool) -> str:
    """Brings the schema to this program's version and returns it. The caller holds the lock and the
    transaction.

    Raises ConfigurationError for a newer schema, for foreign tables, and for an old one unless
    `allowed`.
    """
    script = ScriptDirectory.from_config(config())
    current = MigrationContext.configure(connection).get_current_revision()
    head = script.get_current_head()
    assert head is not None
    if current == head:
        return head
    known = {revision.revision for revision in script.walk_revisions()}
    if current is not None and current not in known:
        raise ConfigurationError(
            f"the store's schema {current} is newer than this program's {head}: start a newer"
            " version of darkroom"
        )
    refuse_foreign(connection)
    if not allowed:
        raise ConfigurationError(
            f"the store's schema is {current or 'empty'}, this program needs {head}: run `darkroom"
            " migrate`"
        )
    command.upgrade(config(connection), "head")
    return head
