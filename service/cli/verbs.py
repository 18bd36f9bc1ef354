"""The client commands that send one request, as a table: help, request, parameters, columns."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from service.cli import direct_keys
from service.cli.api_client import pairs
from service.cli.endpoint_fields import some_change, with_owner
from service.cli.event_commands import Types
from service.cli.list_rows import delivery_row, endpoint_row, task_row, with_missed
from service.cli.output import Text, Texts, option
from service.cli.verb import Verb, named
from service.strict_json import JSON

SCOPES = ("submit", "read", "subscribe", "admin")

Limit = Annotated[int, option("Maximum length of the list.", min=1, max=1000)]
Cursor = Annotated[Text, option("Continues a list that was longer.")]
Metadata = Annotated[Texts, option("May be repeated.", metavar="KEY=VALUE")]
Time = Annotated[Text, option("A time like 2026-02-01T09:00:00Z.", metavar="TIME")]
Overlap = Annotated[
    float | None,
    option("How long the old secret also signs: 86400.", "--overlap", min=0, metavar="SECONDS"),
]
Flag = Annotated[bool, option("Only count.", "--dry-run")]


def text(help: str, metavar: str | None = None) -> Any:
    """The type of an optional text."""
    return Annotated[Text, option(help, metavar=metavar)]


def required(help: str) -> Any:
    """The type of a text that must be given."""
    return Annotated[str, option(help)]


def with_metadata(given: JSON) -> JSON:
    metadata = pairs(given.pop("metadata"), "--metadata")
    return named(given) | {f"metadata.{name}": value for name, value in metadata.items()}


def with_scopes(given: JSON) -> JSON:
    parts = given["scopes"].split(",")
    scopes = list(dict.fromkeys(scope.strip() for scope in parts if scope.strip()))
    if not scopes or not set(scopes) <= set(SCOPES):
        raise typer.BadParameter(f"wants some of {', '.join(SCOPES)}", param_hint="--scopes")
    budget = given.pop("budget")
    return given | {"scopes": scopes} | ({"budget": limit_of(budget)} if budget is not None else {})


def limit_of(text: str) -> JSON:
    """`50/day` as the API has it."""
    parts = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)/(day|month|total)", text)
    if parts is None:
        message = f"{text!r} is no budget: it looks like 50/day, 1000/month or 5000/total"
        raise typer.BadParameter(message)
    return {"period": parts[2], "credits": float(parts[1])}


PAGE = {
    "owner": text("Admin: of this owner.", "NAME"),
    "since": Time,
    "until": Time,
    "limit": Limit,
    "cursor": Cursor,
}
DESCRIPTION = text("What the endpoint is for.")
OPTIONS = {
    "ordered": Annotated[
        bool | None, option("One delivery at a time for each task.", "--ordered/--unordered")
    ],
    "ordered_by": text("Ordered, for each value of this key of the metadata.", "KEY"),
    "metadata": Metadata,
    "header": Annotated[Texts, option("Sent with every request.", metavar="NAME=VALUE")],
    "rate_per_s": text("The most requests in a second.", "N"),
}

TASKS = Verb(
    "List tasks, newest first.",
    "GET /v1/tasks",
    {
        "state": text("queued, submitted, completed, failed, …"),
        "model": text("Of this model."),
        "metadata": Metadata,
        **PAGE,
    },
    ("id", "state", "age", "cost", "images", "created", "model", "prompt"),
    with_metadata,
    row=task_row,
)

ENDPOINTS = {
    "list": Verb(
        "List endpoints, newest first.",
        "GET /v1/endpoints",
        PAGE,
        ("id", "status", "since", "success", "types", "owner", "url"),
        row=endpoint_row,
    ),
    "create": Verb(
        "Create an endpoint. Its secret is shown only here.",
        "POST /v1/endpoints",
        {
            "url": Annotated[str, typer.Argument(help="A public https address.", metavar="URL")],
            "types": Types,
            "description": DESCRIPTION,
            "owner": text("Admin: whose events; '*' for every owner's."),
            **OPTIONS,
        },
        fields=with_owner,
    ),
    "get": Verb("Show an endpoint.", "GET /v1/endpoints/{id}"),
    "patch": Verb(
        "Change the named fields of an endpoint. An empty text clears an option.",
        "PATCH /v1/endpoints/{id}",
        {
            "url": text("Where events are sent."),
            "types": Types,
            "description": DESCRIPTION,
            "status": text("enabled, paused or disabled."),
            **OPTIONS,
        },
        fields=some_change,
        people=with_missed,
    ),
    "delete": Verb("Delete an endpoint.", "DELETE /v1/endpoints/{id}", done="deleted"),
    "rotate": Verb(
        "Give an endpoint a new secret. It is shown only here.",
        "POST /v1/endpoints/{id}/rotate",
        {"overlap_s": Overlap},
    ),
    "test": Verb(
        "Send a test event to an endpoint now, and show the attempt.",
        "POST /v1/endpoints/{id}/test",
        failed="the endpoint did not take it",
    ),
}

ATTEMPTS = ("time", "status", "duration_ms", "error")
DELIVERIES = {
    "list": Verb(
        "List deliveries, newest first.",
        "GET /v1/deliveries",
        {
            "endpoint": text("Of this endpoint.", "ID"),
            "event": text("Of this event.", "ID"),
            "task": text("Of this task.", "ID"),
            "state": text("pending, delivered or dead."),
            **PAGE,
        },
        (
            *("id", "state", "type", "attempts", "next_attempt"),
            *("created_at", "endpoint", "last_error"),
        ),
        row=delivery_row,
    ),
    "get": Verb(
        "Show a delivery with every attempt.",
        "GET /v1/deliveries/{id}",
        columns=ATTEMPTS,
        listed="attempts",
    ),
    "retry": Verb(
        "Make one attempt now, also of a delivered or dead delivery.",
        "POST /v1/deliveries/{id}/retry",
        columns=ATTEMPTS,
        listed="attempts",
    ),
}

REPLAYS = {
    "start": Verb(
        "Send past events to an endpoint again, by default all since its creation that it lacks.",
        "POST /v1/endpoints/{endpoint}/replay",
        {
            "since": Time,
            "until": Time,
            "types": Types,
            "only": Annotated[str, option("undelivered, dead, or all events.")],
            "dry_run": Flag,
        },
    ),
    "get": Verb("Show the progress of a replay.", "GET /v1/replays/{id}"),
    "cancel": Verb(
        "Cancel a replay. What it has not delivered yet is not sent.",
        "DELETE /v1/replays/{id}",
        done="cancelled",
    ),
}

KEYS = {
    "create": Verb(
        "Create a key, and with an owner's first key a callback secret. They are shown only here.",
        "POST /v1/keys",
        {
            "owner": required("Owner of the key, and of the tasks and endpoints that it creates."),
            "scopes": required(f"Comma-separated: {', '.join(SCOPES)}."),
            "budget": text("Of the owner, like 50/day, 1000/month or 5000/total.", "N/PERIOD"),
        },
        fields=with_scopes,
        directly=direct_keys.create,
    ),
    "list": Verb(
        "List keys, each with its first characters.",
        "GET /v1/keys",
        {},
        ("id", "hint", "owner", "scopes", "created_at", "revoked_at"),
        row=lambda key: key | {"scopes": ",".join(key["scopes"])},
        directly=direct_keys.listed,
    ),
    "revoke": Verb(
        "Revoke a key, within 5 seconds in every process.",
        "DELETE /v1/keys/{id}",
        done="revoked",
        directly=direct_keys.revoke,
    ),
    "rotate-secret": Verb(
        "Give an owner a new callback secret. It is shown only here.",
        "POST /v1/keys/rotate-secret",
        {"owner": text("Admin: the owner; otherwise the key's own."), "overlap_s": Overlap},
        directly=direct_keys.rotate_secret,
    ),
}

BUDGETS = {
    "list": Verb(
        "List budgets with what is spent, reserved and left.",
        "GET /v1/budgets",
        {"owner": PAGE["owner"], "limit": Limit, "cursor": Cursor},
        ("owner", "period", "limit", "spent", "reserved", "left"),
    ),
    "set": Verb(
        "Set an owner's budget.",
        "PUT /v1/budgets/{owner}",
        {
            "budget": Annotated[
                str, typer.Argument(help="Like 50/day or 5000/total.", metavar="N/PERIOD")
            ]
        },
        fields=lambda given: limit_of(given["budget"]),
    ),
    "clear": Verb(
        "Clear an owner's budget.",
        "PUT /v1/budgets/{owner}",
        fields=lambda _: {"period": "total", "credits": None},
        done="cleared",
    ),
}

FILES = {
    "list": Verb(
        "List input images, newest first.",
        "GET /v1/files",
        PAGE,
        ("id", "media_type", "width", "height", "bytes", "expires_at", "filename"),
    ),
    "get": Verb("Show an input image.", "GET /v1/files/{id}"),
    "delete": Verb("Erase an input image.", "DELETE /v1/files/{id}", done="deleted"),
}

GROUPS: Mapping[str, tuple[str, Mapping[str, Verb]]] = {
    "endpoints": ("Endpoints that get events.", ENDPOINTS),
    "deliveries": ("Deliveries to endpoints, with every attempt.", DELIVERIES),
    "replay": ("Send past events to an endpoint again.", REPLAYS),
    "budgets": ("Budgets of owners.", BUDGETS),
    "files": ("Input images.", FILES),
    "keys": ("API keys: create, list, revoke.", KEYS),
}
