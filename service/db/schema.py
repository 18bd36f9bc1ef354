"""The schema's version: migrated under a lock, and refused when it is newer than this program."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect

from service.db import file_tables, key_tables  # noqa: F401 - add their tables to the metadata
from service.errors import ConfigurationError


def config(connection: Connection | None = None) -> Config:
    """Alembic's configuration, without an ini file."""
    made = Config()
    made.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    made.attributes["connection"] = connection
    return made


def revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def refuse_foreign(connection: Connection) -> None:
    """ConfigurationError: the database belongs to another program."""
    if revision(connection) is None and inspect(connection).get_table_names():
        raise ConfigurationError(
            "the database holds tables that are not darkroom's: DARKROOM_DATABASE_URL must name"
            " one of its own"
        )


def migrate(connection: Connection, *, allowed: bool) -> str:
    """Migrates to this program's version and returns it, within the caller's lock and transaction.

    ConfigurationError: the schema is newer, the tables are another program's, or the schema is old
    and a migration is not `allowed`.
    """
    script = ScriptDirectory.from_config(config())
    current, head = revision(connection), script.get_current_head()
    assert head is not None
    if current == head:
        return head
    if current is not None and current not in {each.revision for each in script.walk_revisions()}:
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
