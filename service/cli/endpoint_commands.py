"""`darkroom endpoints …` and `darkroom deliveries …`."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from service.cli.client import CommandFailed, call, segment
from service.cli.output import Json, put_fields, put_json, put_table, remark
from service.strict_json import JSON

Id = Annotated[str, typer.Argument(metavar="ID")]
Types = Annotated[
    list[str] | None,
    typer.Option("--type", help="image.task.*, a type, or *; may be repeated.", metavar="TYPE"),
]
Description = Annotated[str | None, typer.Option(help="What it is for.")]
Limit = Annotated[int, typer.Option(help="At most so many.", min=1, max=1000)]
Cursor = Annotated[str | None, typer.Option(help="Where a list that was too long goes on.")]


def show_page(page: JSON, as_json: bool, *columns: str) -> None:
    if as_json:
        put_json(page)
        return
    put_table(page["data"], *columns)
    if page["next_cursor"]:
        remark(f"more: --cursor {page['next_cursor']}")


def show(document: JSON, as_json: bool) -> None:
    if as_json:
        put_json(document)
    else:
        put_fields(document)


def endpoint_list(limit: Limit = 100, cursor: Cursor = None, as_json: Json = False) -> None:
    """List endpoints, newest first."""
    page = call("GET", "/v1/endpoints", params={"limit": limit, "cursor": cursor})
    show_page(page, as_json, "id", "status", "created_at", "owner", "url")


def endpoint_create(
    url: Annotated[
        str, typer.Argument(help="Where events are sent: https, public.", metavar="URL")
    ],
    type: Types = None,
    description: Description = None,
    owner: Annotated[
        str | None, typer.Option(help="Admin: whose events; '*' for every owner's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Subscribe an address. Its secret is shown now and never again."""
    body = changes(url=url, types=type, description=description)
    if owner is not None:
        body["owner"] = None if owner == "*" else owner
    show(call("POST", "/v1/endpoints", body=body), as_json)


def endpoint_get(id: Id, as_json: Json = False) -> None:
    """Show one."""
    show(call("GET", f"/v1/endpoints/{segment(id)}"), as_json)


def endpoint_patch(
    id: Id,
    url: Annotated[str | None, typer.Option(help="Where events are sent.")] = None,
    type: Types = None,
    description: Description = None,
    status: Annotated[str | None, typer.Option(help="enabled, paused or disabled.")] = None,
    as_json: Json = False,
) -> None:
    """Change one: only what is named."""
    body = changes(url=url, types=type, description=description, status=status)
    if not body:
        raise typer.BadParameter(
            "name something to change: --url, --type, --description or --status"
        )
    show(call("PATCH", f"/v1/endpoints/{segment(id)}", body=body), as_json)


def endpoint_delete(id: Id, as_json: Json = False) -> None:
    """Unsubscribe one."""
    call("DELETE", f"/v1/endpoints/{segment(id)}")
    show({"id": id, "deleted": True}, as_json)


def endpoint_rotate(
    id: Id,
    overlap: Annotated[
        float | None,
        typer.Option(help="So long the old secret signs too: 86400.", min=0, metavar="SECONDS"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Give one another secret. It is shown now and never again."""
    show(
        call("POST", f"/v1/endpoints/{segment(id)}/rotate", body=changes(overlap_s=overlap)),
        as_json,
    )


def endpoint_test(id: Id, as_json: Json = False) -> None:
    """Send one a test event now, and show how that went."""
    attempt = call("POST", f"/v1/endpoints/{segment(id)}/test")
    show(attempt, as_json)
    if attempt["error"] is not None:
        raise CommandFailed(f"the endpoint did not take it: {attempt['error']}")


def delivery_list(
    endpoint: Annotated[str | None, typer.Option(help="Of this endpoint.", metavar="ID")] = None,
    event: Annotated[str | None, typer.Option(help="Of this event.", metavar="ID")] = None,
    task: Annotated[str | None, typer.Option(help="Of this task.", metavar="ID")] = None,
    state: Annotated[str | None, typer.Option(help="pending, delivered or dead.")] = None,
    limit: Limit = 100,
    cursor: Cursor = None,
    as_json: Json = False,
) -> None:
    """List deliveries, newest first."""
    asked = {
        "endpoint": endpoint,
        "event": event,
        "task": task,
        "state": state,
        "limit": limit,
        "cursor": cursor,
    }
    page = call("GET", "/v1/deliveries", params=asked)
    if not as_json:
        page["data"] = [{**each, "attempts": len(each["attempts"])} for each in page["data"]]
    show_page(page, as_json, "id", "state", "attempts", "created_at", "event", "endpoint")


def delivery_get(id: Id, as_json: Json = False) -> None:
    """Show one, with every attempt."""
    document = call("GET", f"/v1/deliveries/{segment(id)}")
    if as_json:
        put_json(document)
        return
    put_fields({name: value for name, value in document.items() if name != "attempts"})
    put_table(document["attempts"], "time", "status", "duration_ms", "error")


def delivery_retry(id: Id, as_json: Json = False) -> None:
    """Make one attempt now, also of one that was delivered or is dead."""
    show(call("POST", f"/v1/deliveries/{segment(id)}/retry"), as_json)


def changes(**values: Any) -> JSON:
    """The fields that were named."""
    return {name: value for name, value in values.items() if value not in (None, [])}


ENDPOINTS: Mapping[str, Callable[..., None]] = {
    "list": endpoint_list,
    "create": endpoint_create,
    "get": endpoint_get,
    "patch": endpoint_patch,
    "delete": endpoint_delete,
    "rotate": endpoint_rotate,
    "test": endpoint_test,
}
DELIVERIES: Mapping[str, Callable[..., None]] = {
    "list": delivery_list,
    "get": delivery_get,
    "retry": delivery_retry,
}
