"""`darkroom replay …`: an endpoint gets events again."""

from collections.abc import Callable, Mapping
from typing import Annotated

import typer

from service.cli.client import call, segment
from service.cli.endpoint_commands import Id, Types, changes, show
from service.cli.output import Json

Time = Annotated[str | None, typer.Option(help="A time like 2026-02-01T09:00:00Z.", metavar="TIME")]


def start(
    endpoint: Annotated[str, typer.Argument(metavar="ENDPOINT")],
    since: Time = None,
    until: Time = None,
    type: Types = None,
    only: Annotated[
        str, typer.Option(help="dead: what it never took; all: everything again.")
    ] = "dead",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    as_json: Json = False,
) -> None:
    """Send an endpoint its events again, from the oldest that is kept until now if nothing else is
    said.
    """
    body = changes(since=since, until=until, types=type, only=only, dry_run=dry_run)
    show(call("POST", f"/v1/endpoints/{segment(endpoint)}/replay", body=body), as_json)


def get(id: Id, as_json: Json = False) -> None:
    """Show how far one is."""
    show(call("GET", f"/v1/replays/{segment(id)}"), as_json)


def cancel(id: Id, as_json: Json = False) -> None:
    """End one, with what it has not delivered yet."""
    call("DELETE", f"/v1/replays/{segment(id)}")
    show({"id": id, "cancelled": True}, as_json)


REPLAYS: Mapping[str, Callable[..., None]] = {"start": start, "get": get, "cancel": cancel}
