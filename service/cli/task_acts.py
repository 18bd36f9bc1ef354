"""Acts on one task, and the upstream's account, as a table like that of `verbs`."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from service.cli.output import Text, option
from service.cli.verb import Verb, named
from service.cli.verbs import PAGE, Limit, Time, text
from service.strict_json import JSON


def with_decision(given: JSON) -> JSON:
    if (given["upstream_id"] is None) == (given["decision"] is None):
        raise typer.BadParameter("name either --upstream-id or --as")
    return named({"upstream_id": given["upstream_id"], "as": given["decision"]})


CHOICE = ("owner", "state", "model", "error", "since", "until", "endpoint", "status")
Yes = Annotated[bool, option("Act. Without it, the command only counts.", "--yes")]


def by_filter(given: JSON) -> JSON:
    choice = {name: given.pop(name) for name in CHOICE if name in given}
    yes = given.pop("yes")
    given["as"] = given.pop("decision", None)
    return {**named(given), "filter": named(choice), "dry_run": not yes}


def counted(document: JSON) -> JSON:
    """A count alone says how to act."""
    acted = document.get("done", document.get("id")) is not None
    return document if acted or not document["count"] else {**document, "to act": "add --yes"}


ACTS = {
    "cancel": Verb("Ask the upstream to cancel a task.", "POST /v1/tasks/{id}/cancel"),
    "erase": Verb(
        "Erase the prompt and the images of a task that has ended.",
        "DELETE /v1/tasks/{id}",
        done="erased: its ids, times, state, costs and the sizes of its images are left",
    ),
    "reconcile": Verb(
        "Query the upstream about a task and fetch its missing images now.",
        "POST /v1/tasks/{id}/reconcile",
    ),
    "resolve": Verb(
        "Settle an uncertain submission by hand.",
        "POST /v1/tasks/{id}/resolve",
        {
            "upstream_id": text("The upstream has the task under this id.", "ID"),
            "decision": Annotated[
                Text, option("It has not: failed, or resubmit.", "--as", metavar="DECISION")
            ],
        },
        fields=with_decision,
    ),
    "pause": Verb(
        "Stop submitting to the upstreams. Callbacks, downloads and deliveries go on.",
        "POST /v1/submission",
        {"reason": Annotated[str, typer.Argument(help="Held tasks show it.", metavar="REASON")]},
        fields=lambda given: {"paused": True, **given},
    ),
    "resume": Verb(
        "Submit to the upstreams again.",
        "POST /v1/submission",
        {"reason": text("Why, for the audit.")},
        fields=lambda given: {"paused": False, **given},
    ),
    "audit": Verb(
        "List the acts of operators and owners, oldest first.",
        "GET /v1/audit",
        {
            "owner": PAGE["owner"],
            "action": text("Of this kind, such as task.resolve.", "NAME"),
            "target": text("On this id.", "ID"),
            "after": text("After the entry with this id.", "ID"),
            "limit": Limit,
        },
        ("time", "key_id", "action", "target", "outcome", "reason"),
    ),
    "credits": Verb("Show the credits of the upstream's account.", "GET /v1/credits"),
}

REASON = text("Why, for the audit.")
TASK_CHOICE = {
    "owner": text("Of this owner.", "NAME"),
    "state": text("In this state."),
    "model": text("Of this model.", "NAME"),
    "error": text("With this code of the error.", "CODE"),
    "since": Time,
    "until": Time,
    "reason": REASON,
    "yes": Yes,
}


def bulk(help: str, request: str, takes: Mapping[str, Any]) -> Verb:
    return Verb(help, request, takes, fields=by_filter, people=counted)


BULK = {
    "reconcile": bulk(
        "Query the upstream about many tasks and fetch their missing images now.",
        "POST /v1/bulk/reconcile",
        TASK_CHOICE,
    ),
    "requeue": bulk(
        "Put dead-lettered queries and downloads of many tasks back into their queues.",
        "POST /v1/bulk/requeue",
        TASK_CHOICE,
    ),
    "resolve": bulk(
        "Settle many uncertain submissions by hand.",
        "POST /v1/bulk/resolve",
        {
            "decision": Annotated[str, option("failed, or resubmit.", "--as", metavar="DECISION")],
            **TASK_CHOICE,
        },
    ),
    "deliveries": bulk(
        "Send many deliveries again, by default the failed ones.",
        "POST /v1/replays",
        {
            "endpoint": text("To this endpoint.", "ID"),
            "state": text("pending, delivered or dead."),
            "error": text("With this cause.", "CAUSE"),
            "status": Annotated[int | None, option("With this HTTP status.", metavar="STATUS")],
            "since": Time,
            "until": Time,
            "yes": Yes,
        },
    ),
}
