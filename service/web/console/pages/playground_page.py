"""The playground: a form for a task, its cost, its result, and the last tasks of one's own."""

from starlette.responses import Response

from service.web.console.visits import View, Visit


async def playground(visit: Visit) -> Response:
    query = {"owner": visit.caller.owner, "limit": 20}
    tasks = await visit.call("GET /v1/tasks", query)
    return visit.render("playground.html", tasks=tasks["data"])


VIEWS = (View("GET /console/playground", playground, "submit read", "Playground", "playground"),)
