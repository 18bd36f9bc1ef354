"""`darkroom usage`."""

from typing import Annotated, Any

import typer

from service.cli.api_client import api_client
from service.cli.output import Json, Text, option, put_json, put_table
from service.cli.verb import named
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
    with api_client() as client:
        report = client.call("GET", "/v1/usage", params=query)
    if as_json:
        put_json(report)
        return
    rows: list[JSON] = [row | {by: row["key"]} for row in report["data"]]
    put_table([*rows, report["totals"] | {by: "total"}], by, *COLUMNS)
