"""Spending: usage by day, model and owner, budgets, and the most expensive tasks."""

from datetime import UTC, date, datetime, timedelta

from starlette.responses import Response

from service.errors import ApiError
from service.strict_json import JSON
from service.web.console.visits import View, Visit

DAYS, DEAREST, MAX_BARS = 30, 10, 92


async def spending(visit: Visit) -> Response:
    """Without `from` it is the last 30 days. `owner` is for the scope admin."""
    today = datetime.fromtimestamp(visit.context.resources.clock() / 1000, UTC).date()
    asked = {name: visit.query.get(name) or None for name in ("from", "to", "owner")}
    if asked["from"] is None and asked["to"] is None:
        asked["from"] = f"{today - timedelta(DAYS - 1)}"

    async def report(by: str, **more: int) -> JSON:
        return await visit.call("GET /v1/usage", {**asked, "by": by, **more})

    try:
        days, models = await report("day"), await report("model")
        owners = await report("owner") if visit.caller.sees is None else None
    except ApiError as error:
        if error.param not in asked:
            raise
        return visit.render("spending.html", error=error, asked=asked)
    owner = {"owner": asked["owner"], "limit": 50}
    return visit.render(
        "spending.html",
        asked=asked,
        days=every_day(days["data"], asked["from"], asked["to"] or f"{today}"),
        totals=days["totals"],
        models=models["data"],
        owners=owners["data"] if owners else [],
        dearest=(await report("task", most=DEAREST))["data"],
        budgets=(await visit.call("GET /v1/budgets", owner))["data"],
        net=net,
    )


def every_day(rows: list[JSON], since: str | None, until: str) -> list[JSON]:
    """The rows, with one for each day between, for the last `MAX_BARS` days at the most."""
    by_day = {row["key"]: row for row in rows}
    if not by_day:
        return []
    last = max(date.fromisoformat(until[:10]), date.fromisoformat(max(by_day)))
    first = date.fromisoformat((since or min(by_day))[:10])
    days = [f"{last - timedelta(back)}" for back in range(min((last - first).days + 1, MAX_BARS))]
    return [by_day.get(day, {"key": day, "used": 0, "refunded": 0}) for day in reversed(days)]


def net(row: JSON) -> float:
    cost: float = row["used"] - row["refunded"]
    return cost


async def table(visit: Visit) -> Response:
    """The same figures as CSV."""
    query = {**visit.query, "by": visit.query.get("by") or "day"}
    answer = await visit.answer("GET /v1/usage", query, headers={"accept": "text/csv"})
    answer.headers["content-disposition"] = f'attachment; filename="usage-by-{query["by"]}.csv"'
    return answer


VIEWS = (
    View("GET /console/spending", spending, "read", "Spending", "spending"),
    View("GET /console/spending/usage.csv", table, "read"),
)
