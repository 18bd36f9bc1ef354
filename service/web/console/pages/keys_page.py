"""API keys: create one, with a budget if wanted, and revoke one. For the scope admin."""

from starlette.responses import Response

from service.errors import ApiError
from service.web.auth import SCOPES
from service.web.console.visits import View, Visit


async def keys(visit: Visit, new_key: object = None, error: ApiError | None = None) -> Response:
    """The list and the form. `new_key` comes with its secrets, which this page alone shows."""
    page = await visit.call("GET /v1/keys", {**visit.query, "limit": 50})
    return visit.render("keys.html", error=error, page=page, new_key=new_key, scopes=SCOPES)


def number(text: str) -> float | str:
    """The text of a form as a number, or as it is for the API to refuse."""
    try:
        return float(text)
    except ValueError:
        return text


async def create(visit: Visit) -> Response:
    form = visit.form
    body: dict[str, object] = {"owner": form.get("owner"), "scopes": form.all("scopes")}
    if credits := form.get("credits"):
        body["budget"] = {"period": form.get("period") or "day", "credits": number(credits)}
    try:
        new_key = await visit.call("POST /v1/keys", body=body)
    except ApiError as error:
        return await keys(visit, error=error)
    return await keys(visit, new_key)


async def confirm_revoke(visit: Visit) -> Response:
    return visit.render("key_revoke.html", key_id=visit.path("key_id"))


async def revoke(visit: Visit) -> Response:
    key_id = visit.path("key_id")
    await visit.call("DELETE /v1/keys/{key_id}", key_id=key_id)
    return visit.redirect("/console/keys", f"{key_id} is revoked.")


VIEWS = (
    View("GET /console/keys", keys, "admin", "Keys", "keys"),
    View("POST /console/keys", create, "admin"),
    View("GET /console/keys/{key_id}/revoke", confirm_revoke, "admin"),
    View("POST /console/keys/{key_id}/revoke", revoke, "admin"),
)
