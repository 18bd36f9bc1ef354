"""Acts on one task, and the upstream's account, as a table like that of `verbs`."""

from typing import Annotated

import typer

from service.cli.output import Text, option
from service.cli.verb import Verb, named
from service.cli.verbs import Id, text
from service.strict_json import JSON


def with_decision(given: JSON) -> JSON:
    if (given["upstream_id"] is None) == (given["decision"] is None):
        raise typer.BadParameter("name either --upstream-id or --as")
    return named({"upstream_id": given["upstream_id"], "as": given["decision"]})


ACTS = {
    "cancel": Verb("Ask the upstream to cancel a task.", "POST /v1/tasks/{id}/cancel", {"id": Id}),
    "erase": Verb(
        "Erase the prompt and the images of a task that has ended.",
        "DELETE /v1/tasks/{id}",
        {"id": Id},
        done="erased",
    ),
    "reconcile": Verb(
        "Query the upstream about a task and fetch its missing images now.",
        "POST /v1/tasks/{id}/reconcile",
        {"id": Id},
    ),
    "resolve": Verb(
        "Settle an uncertain submission by hand.",
        "POST /v1/tasks/{id}/resolve",
        {
            "id": Id,
            "upstream_id": text("The upstream has the task under this id.", "ID"),
            "decision": Annotated[
                Text, option("It has not: failed, or resubmit.", "--as", metavar="DECISION")
            ],
        },
        fields=with_decision,
    ),
    "credits": Verb("Show the credits of the upstream's account.", "GET /v1/credits"),
}
