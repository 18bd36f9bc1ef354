"""Sessions of processes that stand still (a virtual machine that is moved, SIGSTOP) in the middle
of a statement.

Between the parts of a statement PostgreSQL waits for its client without any limit, with all that
the transaction has locked; before version 17, with `transaction_timeout`, none of its settings ends
that. Whoever is alive does.
"""

from sqlalchemy import Connection, text

NAME = "darkroom"  # as our sessions call themselves
FOUND = text("""SELECT pid FROM pg_stat_activity
    WHERE datname = current_database() AND usename = current_user
    AND application_name = :name AND state = 'active'
    AND wait_event IN ('ClientRead', 'ClientWrite')
    AND state_change < clock_timestamp() - make_interval(secs => :seconds)""")
END = text("SELECT pg_terminate_backend(:pid)")


def end_still(connection: Connection, seconds: float) -> list[int]:
    """Ends those that have stood still for so long; which they were."""
    found = list(connection.execute(FOUND, {"name": NAME, "seconds": seconds}).scalars())
    return [pid for pid in found if connection.execute(END, {"pid": pid}).scalar()]
