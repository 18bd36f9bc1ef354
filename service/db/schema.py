"""The schema's version: migrated under a lock, and refused when it is newer than this program.

Alembic is imported for a migration alone: it takes 100 ms and 10 MB of a start.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, inspect, text

from service.errors import ConfigurationError, SchemaMismatch

if TYPE_CHECKING:
    from alembic.config import Config

MIGRATIONS = Path(__file__).parent / "migrations"


def config(connection: Connection | None = None) -> "Config":
    """Alembic's configuration, without an ini file."""
    from alembic.config import Config

    configuration = Config()
    configuration.set_main_option("script_location", str(MIGRATIONS))
    configuration.attributes["connection"] = connection
    return configuration


def revisions() -> list[str]:
    """Every revision, oldest first. A migration's file name begins with its revision."""
    return sorted(path.name.partition("_")[0] for path in MIGRATIONS.glob("versions/[0-9]*.py"))


def revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    current: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return current


def refuse_foreign(connection: Connection) -> None:
    """ConfigurationError: the database belongs to another program."""
    if revision(connection) is None and inspect(connection).get_table_names():
        raise ConfigurationError(
            "the database holds tables that are not darkroom's: DARKROOM_DATABASE_URL must name"
            " one of its own"
        )


def migrate(connection: Connection, *, allowed: bool) -> str:
    """Migrates to this program's version and returns it, within the caller's lock and transaction.

    SchemaMismatch: the schema is newer, or old and a migration is not `allowed`.
    ConfigurationError: the tables are another program's.
    """
    history, current = revisions(), revision(connection)
    head = history[-1]
    if current == head:
        return head
    if current is not None and current not in history:
        raise SchemaMismatch(
            f"the store's schema {current} is newer than this program's {head}: start a newer"
            " version of darkroom"
        )
    refuse_foreign(connection)
    if not allowed:
        raise SchemaMismatch(
            f"the store's schema is {current or 'empty'}, this program needs {head}: run `darkroom"
            " migrate`"
        )
    from alembic import command

    command.upgrade(config(connection), "head")
    return head
