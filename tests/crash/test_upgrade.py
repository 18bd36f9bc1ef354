"""A rolling upgrade: the next version migrates while this version works, both work side by side,
and then this version stops.
"""

import asyncio
import shutil
import signal
import textwrap
from pathlib import Path

import asyncpg
import pytest

from tests.crash.group import PATIENCE_S, WEB, WORKER, ask, groups
from tests.crash.load import loaded, sending
from tests.environment import ROOT
from tests.processes import Running, darkroom
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(180)

# The changes that a migration may make to an existing schema (docs/decisions/0021).
EXPANDS = """
    import sqlalchemy as sa
    from alembic import op

    revision = "9998"
    down_revision = "{head}"


    def upgrade() -> None:
        op.add_column("tasks", sa.Column("next_note", sa.Text(), nullable=True))
        count = sa.Column("next_count", sa.Integer(), nullable=False, server_default="0")
        op.add_column("deliveries", count)
        op.create_table("next_things", sa.Column("id", sa.String(40), primary_key=True))
        op.create_index("ix_tasks_next_note", "tasks", ["next_note"])
"""


WAITING = """
    SELECT 1 FROM pg_stat_activity
    WHERE datname = current_database() AND wait_event_type = 'Lock' AND state = 'active'
    AND query LIKE 'ALTER TABLE%'
"""


def next_version(folder: Path) -> Path:
    """A folder with a copy of the program that has one more migration."""
    shutil.copytree(ROOT / "service", folder / "service")  # with the bytecode
    versions = folder / "service" / "db" / "migrations" / "versions"
    head = max(path.name[:4] for path in versions.glob("[0-9]*.py"))
    (versions / "9998_next.py").write_text(textwrap.dedent(EXPANDS).format(head=head))
    return folder


async def schema(database: str) -> str:
    ((revision,),) = await ask(database, "SELECT version_num FROM alembic_version")
    return str(revision)


async def test_old_and_new_work_side_by_side(
    tmp_path: Path, postgres_server: str, postgres_template: str
) -> None:
    """The next version migrates under load. The service refuses no request and no work fails. The
    old processes stop when the new version is running.
    """
    async with groups(tmp_path, postgres_server, postgres_template) as group:
        # A busy machine lets neither a lease nor a submission run out of time.
        slow = {"TEST_LEASE_MS": "20000", "SUBMIT_TIMEOUT_S": "60"}
        web, worker = [await group.start(role, **slow) for role in (WEB, WORKER)]
        load = await loaded(web.client, 10)
        group.accepted |= {task["id"] for task in load.tasks}
        async with sending(load, str(web.client.base_url).rstrip("/")):
            before = [asyncio.create_task(group.order(web, number)) for number in range(10)]
            new = Running(
                *WORKER,
                folder=next_version(tmp_path),
                **worker.environment | {"PYTHONPATH": str(tmp_path), "DARKROOM_PORT": "0"},
            )
            try:
                await asyncio.to_thread(lambda: new.address)
                assert await schema(group.database) == "9998"
                await asyncio.gather(
                    *before, *(group.order(web, number) for number in range(10, 15))
                )
                worker.process.signal(signal.SIGTERM)
                await wait_until(lambda: worker.process.code is not None, PATIENCE_S)
                assert worker.process.code == 0
                group.members.remove(worker)
                await asyncio.gather(*(group.order(web, number) for number in range(15, 20)))
                states = await group.ended(web)
            finally:
                new.process.kill()
                await asyncio.to_thread(new.ended)
        assert set(load.answers) == {"200"}, load.answers
        ours = {task["id"] for task in load.tasks}
        assert {state for task_id, state in states.items() if task_id not in ours} == {"completed"}
        for line in (*web.lines(), *worker.lines()):
            assert line["level"] in ("info", "debug"), line
        assert new.logged("worker.failed") == []
        assert new.logged("task.settled"), "the new one works too"
        refused = await asyncio.to_thread(
            lambda: darkroom("worker", folder=web.folder, **worker.environment)
        )
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1), refused.stderr
        assert "schema 9998 is newer than this program's" in refused.stderr
        group.alive()


async def test_a_migration_that_must_wait_lets_callbacks_pass(
    tmp_path: Path, postgres_server: str, postgres_template: str
) -> None:
    """Another session reads the table for long, as a dump does. The migration retries again and
    again, and its lock never blocks a callback for long.
    """
    async with groups(tmp_path, postgres_server, postgres_template) as group:
        web = await group.start(WEB)
        load = await loaded(web.client, 5, worker=False)
        reader = await asyncpg.connect(group.database)
        try:
            async with reader.transaction():
                await reader.execute("SELECT count(*) FROM tasks")
                new = Running(
                    *WORKER,
                    folder=next_version(tmp_path),
                    **web.environment | {"PYTHONPATH": str(tmp_path), "DARKROOM_PORT": "0"},
                )
                async with sending(load, str(web.client.base_url).rstrip("/")):

                    async def waits() -> bool:
                        return bool(await ask(group.database, WAITING))

                    async def lets_pass() -> bool:
                        return not await waits()

                    for happens in (waits, lets_pass, waits):
                        await wait_until(happens, PATIENCE_S)
        finally:
            await reader.close()
        try:
            await asyncio.to_thread(lambda: new.address)
        finally:
            new.process.kill()
            await asyncio.to_thread(new.ended)
        assert set(load.answers) == {"200"}, load.answers
        assert await schema(group.database) == "9998"
