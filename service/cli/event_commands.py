"""`darkroom events`: the outbox as JSON lines."""

import time
from typing import Annotated

import typer

from service.cli.client import NobodyAnswers, Service, service
from service.cli.output import Json, put_json, remark
from service.errors import EgressError
from service.strict_json import JSON

PAGE = 1000
HOLD_S = 30
# failed calls in a row that a follower bears: 1 + 2 + 4 + … + 64 = 127 s, a restart of the service
PATIENCE = 8


def events(
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what comes, until interrupted.")
    ] = False,
    after: Annotated[
        str,
        typer.Option(
            help="A sequence; without it from the oldest event that is kept.", metavar="SEQ"
        ),
    ] = "0",
    type: Annotated[
        list[str] | None,
        typer.Option(help="A type, or image.task.* and the like; may be repeated.", metavar="TYPE"),
    ] = None,
    task: Annotated[str | None, typer.Option(help="Of this task alone.", metavar="ID")] = None,
    as_json: Json = False,  # noqa: ARG001 - every command has it
) -> None:
    """Print events as JSON lines, in their order. They are JSON with and without --json."""
    with service() as client:
        place, failures = after, 0
        while True:
            try:
                page = read(client, place, type or [], task, HOLD_S if follow else 0)
                failures = 0
            except (NobodyAnswers, EgressError):
                failures += 1
                if not follow or place == after or failures == PATIENCE:
                    raise
                time.sleep(2 ** (failures - 1))
                continue
            if page["resync"]:
                remark(f"events after {place} are no longer all kept")
            for event in page["data"]:
                put_json(event)
            place = page["next_after"]
            if not follow and len(page["data"]) < PAGE:
                return


def read(client: Service, after: str, types: list[str], task: str | None, hold_s: int) -> JSON:
    asked = {
        "after": after,
        "type": ",".join(types) or None,
        "task": task,
        "limit": PAGE,
        "wait": hold_s or None,
    }
    return client.call("GET", "/v1/events", params=asked)
