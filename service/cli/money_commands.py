"""`darkroom usage`, and the cost of a submission."""

import sys
from typing import Annotated, Any

import typer

from service.cli.api_client import ApiClient, CommandFailed, api_client
from service.cli.output import Json, Text, option, put_json, put_table, remark
from service.cli.place import Place
from service.cli.verb import named
from service.errors import EgressError
from service.strict_json import JSON

COLUMNS = ("tasks", "images_requested", "images", "estimated", "reserved", "used", "refunded")
GROUPS = ("day", "model", "owner", "task")


def usage(
    by: Annotated[str, option("day, model, owner or task.", metavar="KEY")] = "day",
    since: Annotated[Text, option("From this day or time.", "--from", metavar="TIME")] = None,
    until: Annotated[Text, option("To this day or time.", "--to", metavar="TIME")] = None,
    owner: Annotated[Text, option("Admin: of this owner.", metavar="NAME")] = None,
    as_json: Json = False,
) -> None:
    """Show tasks, images and credits by day, model, owner or task."""
    if by not in GROUPS:
        raise typer.BadParameter(f"wants one of {', '.join(GROUPS)}", param_hint="--by")
    query: dict[str, Any] = named({"by": by, "from": since, "to": until, "owner": owner})
    client = api_client()
    report = client.call("GET", "/v1/usage", params=query)
    if as_json:
        put_json(report)
        return
    rows: list[JSON] = [row | {by: row["key"]} for row in report["data"]]
    put_table([*rows, report["totals"] | {by: "total"}], by, *COLUMNS)


def has_ended(task: JSON) -> bool:
    return task["status"] not in ("pending", "processing")


def estimated(client: ApiClient, order: JSON) -> str | None:
    """The estimate of a submission in words, printed at once on a terminal, with the place. None:
    no answer. The submission itself reports what is wrong with it.
    """
    remark(f"at {client.at}")
    try:
        cost = client.call("POST", "/v1/estimates", body=order)
    except (CommandFailed, EgressError):
        return None
    known = "unknown" if cost["credits"] is None else f"{cost['credits']} {cost['unit']}"
    remark(text := f"estimate: {known}")
    return text


def say_cost(task: JSON, estimate: str | None, at: Place) -> None:
    """Prints what a task cost, or what is reserved for it, on standard error. Without a terminal
    the place and the estimate too, and nothing for a task that failed: a failure is one line there.
    """
    used, reserved = task["usage"]["credits_used"], task["usage"]["credits_reserved"]
    cost = f"reserved: {reserved} credits" if used is None else f"cost: {used} credits"
    cost = "" if used is None and reserved is None else cost
    if sys.stderr.isatty():
        remark(cost)
    elif not has_ended(task) or task["state"] == "completed":
        sys.stderr.write("".join(f"{line}\n" for line in (f"at {at}", estimate, cost) if line))
