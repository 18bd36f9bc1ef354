"""Money: entries of the ledger, usage, and budgets."""

import csv
import io
import re
from collections import Counter
from datetime import date
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.credits import credits_number, millionths
from service.db.operator_tables import ledger
from service.db.paging import Row, Selection
from service.errors import invalid_request
from service.ids import rfc3339
from service.strict_json import JSON
from service.tasks import usage
from service.tasks.budgets import Budget, BudgetState, budget_states, set_budgets
from service.tasks.usage import GROUPS, MAX_KEYS, figures_document
from service.upstreams.field_values import shown
from service.web.acts import perform
from service.web.bodies import asks_for, query_owner, query_text, query_time, read_model
from service.web.context import resources_of
from service.web.field_schemas import OWNER
from service.web.list_page import numbered_list, page, query_limit
from service.web.money_schemas import BudgetChange
from service.web.parameters import ENTRY_ID

DATE = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # at the beginning, a spreadsheet runs the text


async def entries(request: Request) -> Response:
    """List the entries of the ledger, oldest first."""
    owner, task = query_owner(request), query_text(request, "task")
    return await numbered_list(request, ledger, ENTRY_ID, entry_document, owner=owner, task_id=task)


def entry_document(row: Row) -> JSON:
    names = ("id", "task_id", "owner", "model", "upstream", "kind", "source")
    shown = {name: row[name] for name in names}
    return {**shown, "time": rfc3339(row["time"]), "credits": credits_number(row["credits"])}


async def report(request: Request) -> Response:
    """Show the usage by day, model, owner or task."""
    by = query_text(request, "by", GROUPS) or "day"
    since, until = query_day(request, "from", 0), query_day(request, "to", 1)
    selection = Selection(query_owner(request), since=since, until=until)
    most = query_limit(request, "most") if "most" in request.query_params else None
    groups = await resources_of(request).store.read(usage.usage_by, by, selection, most)
    if len(groups) > MAX_KEYS:
        message = f"the report has more than {MAX_KEYS} rows: narrow it by from and to"
        raise invalid_request(message, "by")
    rows = [{"key": key, **figures_document(row)} for key, row in groups.items()]
    sums = Counter[str]()
    for row in groups.values():
        sums.update(row)
    totals = figures_document(sums)
    if asks_for(request, "text/csv"):
        return as_csv(rows, ["key", *totals])
    return JSONResponse({"data": rows, "totals": totals})


async def set_budget(request: Request) -> Response:
    """Set or clear an owner's budget."""
    owner, change = request.path_params["owner"], await read_model(request, BudgetChange)
    if not re.fullmatch(OWNER, owner):
        message = f"owner must be an owner's name ({OWNER}), not {shown(owner)}"
        raise invalid_request(message, "owner")
    budget = Budget(owner, change.period, millionths(change.credits))
    detail = {"period": change.period, "credits": credits_number(budget.credits)}
    state = await perform(request, "budget.set", owner, set_budgets, budget, detail=detail)
    return JSONResponse(budget_document(state))


async def budgets(request: Request) -> Response:
    """List budgets with what is spent and reserved, by owner."""
    rows = partial(budget_states, now=resources_of(request).store.clock())
    return await page(request, rows, lambda state: (0, state.owner), budget_document)


def budget_document(state: BudgetState) -> JSON:
    figures = state.figures()
    shown = {"owner": state.owner, "period": state.period, "since": rfc3339(state.since)}
    return {**shown, **figures, "credits": figures["limit"]}


def query_day(request: Request, name: str, days: int) -> int | None:
    """A time, or a date of UTC: its beginning, or with `days` 1 its end. Raises ApiError 400."""
    text = request.query_params.get(name, "")
    if not DATE.fullmatch(text):
        return query_time(request, name)
    try:
        day = date.fromisoformat(text)
    except ValueError:
        raise invalid_request(f"{name}: there is no date {text}", name) from None
    return ((day - date(1970, 1, 1)).days + days) * usage.DAY_MS


def as_csv(rows: list[JSON], columns: list[str]) -> Response:
    """The rows as CSV (RFC 4180)."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    for row in rows:
        key = f"'{row['key']}" if row["key"].startswith(FORMULA) else row["key"]
        writer.writerow(row | {"key": key})
    return Response(text.getvalue(), media_type="text/csv")
