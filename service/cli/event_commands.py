"""`darkroom events` and `darkroom listen`, which follow the events while a service restarts."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from service.cli.api_client import ApiClient, ServiceBusy, ServiceUnreachable, api_client
from service.cli.output import Json, Text, Texts, option, put_json, put_result, remark
from service.errors import EgressError
from service.strict_json import JSON, compact_json

MAX_FAILURES = 8
EVENTS_PAGE, LISTEN_PAGE, WAIT_S = 1000, 100, 30
NO_TASK = "task_none"  # an empty page: the service examined all events, and names the last
Types = Annotated[
    Texts, option("image.task.*, a type, or *; may be repeated.", "--type", metavar="TYPE")
]


def event_pages(
    client: ApiClient,
    query: Mapping[str, Any],
    last: str,
    asks_again: Callable[[str], bool] = lambda _: True,
) -> Iterator[list[JSON]]:
    """Pages of events after the sequence `last`, without end. After a failure the command asks
    again if `asks_again` agrees, up to 8 times in a row: 1 + 2 + … + 64 = 127 s, a restart.
    """
    failures = 0
    while True:
        try:
            page = client.call("GET", "/v1/events", params={**query, "after": last})
            failures = 0
        except (ServiceUnreachable, ServiceBusy, EgressError):
            failures += 1
            if not asks_again(last) or failures == MAX_FAILURES:
                raise
            time.sleep(2 ** (failures - 1))
            continue
        if page["resync"]:
            remark(f"events after {last} are no longer all kept")
        last = page["next_after"]
        yield page["data"]


def events(
    follow: Annotated[
        bool, option("Print new events until interrupted.", "--follow", "-f")
    ] = False,
    after: Annotated[
        str, option("Start after this sequence.", metavar="SEQ", show_default=False)
    ] = "0",
    types: Types = None,
    task: Annotated[Text, option("Of this task.", metavar="ID")] = None,
    as_json: Json = False,  # noqa: ARG001 - every command has it
) -> None:
    """Print events in their order, as JSON lines with and without --json."""
    query = {"type": ",".join(types or []) or None, "task": task, "limit": EVENTS_PAGE}
    if follow:
        query["wait"] = WAIT_S
    for page in event_pages(api_client(), query, after, lambda last: follow and last != after):
        for event in page:
            put_json(event)
        if not follow and len(page) < EVENTS_PAGE:
            return


def listen(
    url: Annotated[str, typer.Argument(help="Like http://127.0.0.1:3000/hooks.", metavar="URL")],
    types: Types = None,
    after: Annotated[Text, option("Also the events after this sequence.", metavar="SEQ")] = None,
    secret: Annotated[
        Text, option("Signs the requests. By default a new one, which is shown.", metavar="whsec_…")
    ] = None,
    as_json: Json = False,
) -> None:
    """Forward events to a program on this machine, signed as webhooks, until interrupted. Each is
    sent once, in order.
    """
    from service.signing import new_secret

    receiver(url)
    secret = checked(secret) if secret else new_secret(os.urandom(32))
    client, query = api_client(), {"type": ",".join(types or []) or None, "limit": LISTEN_PAGE}
    last = after
    if last is None:
        last = client.call("GET", "/v1/events", params={"task": NO_TASK})["next_after"]
    started = {"url": url, "secret": secret, "after": last}
    put_result(started, as_json, f"forwarding to {url}, signed with {secret}")
    for page in event_pages(client, {**query, "wait": WAIT_S}, last):
        for event in page:
            forward(url, secret, event, as_json)


def receiver(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise typer.BadParameter(f"{url!r} is no http or https address", param_hint="URL")


def checked(secret: str) -> str:
    from service.signing import sign_webhook

    try:
        sign_webhook([secret], "evt", 0, b"")
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--secret") from None
    return secret


def forward(url: str, secret: str, event: JSON, as_json: bool) -> None:
    """Sends one event, and prints what the program answered. A failure is not retried."""
    from service.net.service_client import ServiceClient
    from service.signing import sign_webhook

    parts, body, now = urlsplit(url), compact_json(event).encode(), int(time.time())
    headers = {
        "content-type": "application/cloudevents+json",
        "webhook-id": event["id"],
        "webhook-timestamp": str(now),
        "webhook-signature": sign_webhook([secret], event["id"], now, body),
    }
    path = parts.path or "/"
    path += f"?{parts.query}" if parts.query else ""
    status, error = None, None
    started = time.monotonic()
    try:
        target = ServiceClient(f"{parts.scheme}://{parts.netloc}", None)
        status = target.call("POST", path, content=body, headers=headers).status
    except EgressError as failure:
        error = str(failure)
    milliseconds = round((time.monotonic() - started) * 1000)
    fields = {name: event[name] for name in ("sequence", "id", "type")}
    fields |= {"status": status, "error": error, "duration_ms": milliseconds}
    line = f"{event['id']}  {event['type']}  {status or error}  {milliseconds} ms"
    put_result(fields, as_json, line)
