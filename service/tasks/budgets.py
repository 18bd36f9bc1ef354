"""Budgets: how many credits an owner's tasks may cost in a period.

The transaction that inserts a task locks the owner's budget, sums the ledger and reserves the
estimate. A second process waits for that lock and then sees the new entries, so several processes
together never exceed a budget (docs/money.md).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog
from sqlalchemy import Connection, bindparam, delete, func, insert, select, update

from service.credits import credits_number, credits_text
from service.db.operator_tables import budgets, ledger
from service.db.paging import Row, Selection, matching
from service.db.transaction import Transaction
from service.errors import ApiError
from service.events import outbox
from service.ops.metrics import Metrics
from service.strict_json import JSON
from service.tasks.ledger import RESERVE, SPENT
from service.tasks.rows import TaskRow

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit in millionths of a credit. None: the owner has no budget from now on."""

    owner: str
    period: str
    credits: int | None


@dataclass(slots=True)
class BudgetState:
    """A budget with the sums of its current period, which began at `since`."""

    owner: str
    period: str
    limit: int | None
    since: int
    spent: int = 0
    reserved: int = 0

    @property
    def left(self) -> int | None:
        return None if self.limit is None else self.limit - self.spent - self.reserved

    def figures(self) -> JSON:
        names = ("limit", "spent", "reserved", "left")
        return {name: credits_number(getattr(self, name)) for name in names}


@dataclass(frozen=True, slots=True)
class BudgetRefusal:
    """A task that the owner's budget does not allow. `needed` None: its price is unknown."""

    needed: int | None
    state: BudgetState

    @property
    def budget(self) -> JSON:
        own = {"owner": self.state.owner, "period": self.state.period}
        return {**own, **self.state.figures(), "estimate": credits_number(self.needed)}

    @property
    def message(self) -> str:
        state = self.state
        needs = (
            "the catalogue has no price of the model, and DARKROOM_UNPRICED is refuse"
            if self.needed is None
            else f"the task needs {credits_text(self.needed)} credits"
        )
        period = "in total" if self.state.period == "total" else f"a {self.state.period}"
        return (
            f"{needs}: the budget of {credits_text(state.limit)} {period} has"
            f" {credits_text(state.left)} left ({credits_text(state.spent)} spent,"
            f" {credits_text(state.reserved)} reserved)"
        )


def period_start(period: str, now: int) -> int:
    """The beginning of the current day or month of UTC, in milliseconds."""
    if period == "total":
        return 0
    start = datetime.fromtimestamp(now / 1000, UTC).replace(
        hour=0, minute=0, second=0, microsecond=0
    )
    return round((start.replace(day=1) if period == "month" else start).timestamp() * 1000)


def state_of(connection: Connection, budget: Budget, now: int) -> BudgetState:
    state = BudgetState(
        budget.owner, budget.period, budget.credits, period_start(budget.period, now)
    )
    mine = (ledger.c.owner == budget.owner, ledger.c.created_at >= state.since)
    sums = select(ledger.c.kind, func.sum(ledger.c.credits)).where(*mine)
    for kind, credits in connection.execute(sums.group_by(ledger.c.kind)):
        state.spent += int(credits) if kind in SPENT else 0
        state.reserved += int(credits) if kind == RESERVE else 0
    return state


def budget_states(connection: Connection, wanted: Selection, now: int) -> list[BudgetState]:
    """The budgets of one owner or of all, in the order of the owners' names."""
    statement = matching(select(budgets), budgets, owner=wanted.owner)
    if wanted.after is not None:
        statement = statement.where(budgets.c.owner > wanted.after[1])
    rows = connection.execute(statement.order_by(budgets.c.owner).limit(wanted.limit)).mappings()
    return [state_of(connection, budget_of(row), now) for row in list(rows)]


def budget_of(row: Row) -> Budget:
    return Budget(row["owner"], row["period"], row["credits"])


def set_budgets(tx: Transaction, items: Sequence[Budget]) -> list[BudgetState]:
    """Sets or clears budgets. What was spent and reserved in the period counts."""
    for item in items:
        own = budgets.c.owner == item.owner
        values = {"period": item.period, "credits": item.credits, "changed_at": tx.now}
        if item.credits is None:
            tx.connection.execute(delete(budgets).where(own))
        elif not tx.connection.execute(
            update(budgets).where(own).values(**values, exhausted_since=None)
        ).rowcount:
            tx.connection.execute(insert(budgets).values(owner=item.owner, **values))
    return [state_of(tx.connection, item, tx.now) for item in items]


_OWN = budgets.c.owner.in_(bindparam("owners", expanding=True))
HAS_BUDGET = select(budgets.c.owner).where(_OWN).exists()  # whether one of `owners` has a budget


class BudgetCheck:
    """The budgets of these owners, locked until the transaction ends. `unpriced`: tasks without a
    price are allowed as long as something is left.
    """

    def __init__(self, tx: Transaction, owners: Iterable[str], *, unpriced: bool) -> None:
        self._tx, self._unpriced = tx, unpriced
        rows: Mapping[str, Row] = {}
        if names := set(owners):
            statement = select(budgets).where(budgets.c.owner.in_(names))
            locked = statement.order_by(budgets.c.owner).with_for_update()
            rows = {row["owner"]: row for row in tx.connection.execute(locked).mappings().all()}
        # A statement after the lock sees what the transaction before it has reserved.
        self._states = {
            owner: state_of(tx.connection, budget_of(row), tx.now) for owner, row in rows.items()
        }
        self._exhausted_since = {owner: row["exhausted_since"] for owner, row in rows.items()}

    def admit(self, row: TaskRow) -> BudgetRefusal | None:
        """Counts the task's estimate, or says why the task must not be inserted."""
        state = self._states.get(row.owner)
        if state is None or state.left is None:
            return None
        priced = row.credits_estimated is not None
        needed = row.credits_estimated or 0
        if (priced or self._unpriced) and max(needed, not priced) <= state.left:
            state.reserved += needed
            return None
        if priced or self._unpriced:
            self._exhausted(state)
        return BudgetRefusal(None if not priced and not self._unpriced else needed, state)

    def _exhausted(self, state: BudgetState) -> None:
        """Tells operators of the first refusal in the period."""
        if self._exhausted_since[state.owner] == state.since:
            return
        self._exhausted_since[state.owner] = state.since
        mark = update(budgets).where(budgets.c.owner == state.owner)
        self._tx.connection.execute(mark.values(exhausted_since=state.since))
        data = {"owner": state.owner, "period": state.period, **state.figures()}
        outbox.emit_operators(self._tx, "budget.exhausted", data)


def over_budget(task: TaskRow, refusal: BudgetRefusal, metrics: Metrics) -> ApiError:
    metrics.budget_refusals.inc()
    figures = refusal.state.figures()
    log.warning(
        "budget.refused",
        owner=task.owner,
        model=task.model,
        period=refusal.state.period,
        needed=credits_number(refusal.needed),
        limit=figures["limit"],
        spent=figures["spent"],
        reserved=figures["reserved"],
        left=figures["left"],
    )
    return ApiError(402, "budget_exceeded", refusal.message, figures={"budget": refusal.budget})
