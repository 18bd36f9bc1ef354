"""Access rules: keys, scopes and owners."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from service.web import auth
from service.web.auth import SCOPES
from service.web.routes.operation import Spec
from service.web.routes.table import SPECS
from tests.api import TIME, UNTIL_DONE, an_id, got, refused, submitted
from tests.waiting import wait_until
from tests.world import ADMIN_KEY, World, subscriber, world

JSON = dict[str, Any]
ONCE = ("key", "callback_secret", "budget")  # in the answer that makes a key

TABLE: Mapping[tuple[str, str], set[str]] = {
    ("POST", "/v1/images/generations"): {"submit"},
    ("GET", "/v1/images/generations/{task_id}"): {"read"},
    ("GET", "/v1/tasks"): {"read"},
    ("GET", "/v1/tasks/{task_id}"): {"read"},
    ("DELETE", "/v1/tasks/{task_id}"): {"submit"},
    ("GET", "/v1/tasks/{task_id}/timeline"): {"read"},
    ("GET", "/v1/tasks/{task_id}/callbacks"): {"read"},
    ("POST", "/v1/tasks/{task_id}/cancel"): {"submit"},
    ("POST", "/v1/tasks/{task_id}/reconcile"): {"admin"},
    ("POST", "/v1/tasks/{task_id}/resolve"): {"admin"},
    ("POST", "/v1/bulk/reconcile"): {"admin"},
    ("POST", "/v1/bulk/requeue"): {"admin"},
    ("POST", "/v1/bulk/resolve"): {"admin"},
    ("GET", "/v1/submission"): {"admin"},
    ("POST", "/v1/submission"): {"admin"},
    ("GET", "/v1/doctor"): {"admin"},
    ("GET", "/v1/audit"): {"admin"},
    ("GET", "/v1/catalogue"): {"read", "submit"},
    ("GET", "/v1/catalogue/{model}"): {"read", "submit"},
    ("POST", "/v1/estimates"): {"read", "submit"},
    ("GET", "/v1/ledger"): {"read"},
    ("GET", "/v1/usage"): {"read"},
    ("GET", "/.well-known/endpoints/{endpoint_id}/jwks.json"): set(),
    ("GET", "/v1/budgets"): {"read"},
    ("PUT", "/v1/budgets/{owner}"): {"admin"},
    ("POST", "/v1/files"): {"submit"},
    ("GET", "/v1/files"): {"read", "submit"},
    ("GET", "/v1/files/{file_id}"): {"read", "submit"},
    ("GET", "/v1/files/{file_id}/content"): {"read", "submit"},
    ("DELETE", "/v1/files/{file_id}"): {"submit"},
    ("POST", "/api/v1/files/upload/stream"): {"submit"},
    ("POST", "/api/v1/files/upload/base64"): {"submit"},
    ("POST", "/api/v1/files/upload/url"): {"submit"},
    ("GET", "/api/v1/files/list"): {"read", "submit"},
    ("GET", "/api/v1/files/quota"): {"read", "submit"},
    ("DELETE", "/api/v1/files/{file_id}"): {"submit"},
    ("GET", "/v1/credits"): {"admin"},
    ("GET", "/v1/models"): {"read"},
    ("GET", "/v1/events"): {"subscribe", "read"},
    ("POST", "/v1/endpoints"): {"subscribe"},
    ("GET", "/v1/endpoints"): {"subscribe"},
    ("GET", "/v1/endpoints/{endpoint_id}"): {"subscribe"},
    ("PATCH", "/v1/endpoints/{endpoint_id}"): {"subscribe"},
    ("DELETE", "/v1/endpoints/{endpoint_id}"): {"subscribe"},
    ("POST", "/v1/endpoints/{endpoint_id}/rotate"): {"subscribe"},
    ("POST", "/v1/endpoints/{endpoint_id}/test"): {"subscribe"},
    ("POST", "/v1/endpoints/{endpoint_id}/replay"): {"subscribe"},
    ("GET", "/v1/endpoints/{endpoint_id}/health"): {"subscribe"},
    ("GET", "/v1/deliveries/groups"): {"subscribe"},
    ("GET", "/v1/deliveries/{delivery_id}/request"): {"subscribe"},
    ("POST", "/v1/replays"): {"subscribe"},
    ("GET", "/v1/replays/{replay_id}"): {"subscribe"},
    ("DELETE", "/v1/replays/{replay_id}"): {"subscribe"},
    ("GET", "/v1/deliveries"): {"subscribe"},
    ("GET", "/v1/deliveries/{delivery_id}"): {"subscribe"},
    ("POST", "/v1/deliveries/{delivery_id}/retry"): {"subscribe"},
    ("POST", "/v1/keys"): {"admin"},
    ("POST", "/v1/keys/rotate-secret"): {"subscribe"},
    ("GET", "/v1/keys"): {"admin"},
    ("DELETE", "/v1/keys/{key_id}"): {"admin"},
    ("GET", "/metrics"): {"admin"},
    ("GET", "/images/{image_id}"): set(),
    ("GET", "/healthz"): set(),
    ("GET", "/readyz"): set(),
    ("GET", "/openapi.json"): set(),
    ("GET", "/asyncapi.json"): set(),
}


async def ask(client: httpx.AsyncClient, spec: Spec, **headers: str) -> httpx.Response:
    """Sends the operation with unknown ids and an empty body."""
    return await client.request(
        spec.method,
        re.sub(r"\{\w+\}", "nothing", spec.path),
        json={} if spec.body else None,
        headers=headers,
    )


def test_every_route_has_the_scopes_it_is_to_have() -> None:
    """This table records every decision: a new route or a changed scope must be entered here."""
    assert {(spec.method, spec.path): set(spec.scopes) for spec in SPECS} == TABLE


@pytest.mark.slow
async def test_each_scope_opens_its_routes_and_no_other(here: World) -> None:
    """A key with one scope gets 403 on every route that does not list it. `admin` opens all."""
    for scope in SCOPES:
        async with here.owner(scope) as client:
            for spec in SPECS:
                answer = await ask(client, spec)
                if spec.scopes and scope != "admin" and scope not in spec.scopes:
                    said = refused(answer, 403, "permission_denied")
                    assert all(name in said["message"] for name in spec.scopes)
                else:
                    assert answer.status_code not in (401, 403), (scope, spec.path)


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        f"Basic {ADMIN_KEY}",
        ADMIN_KEY,
        f"Bearer {ADMIN_KEY}x",
        f"Bearer {ADMIN_KEY} x",
    ],
)
async def test_without_a_valid_key_nothing_is_shown(here: World, authorization: str | None) -> None:
    """The answer is 401 before any other check, and it shows how to send a key."""
    headers = {} if authorization is None else {"authorization": authorization}
    for spec in SPECS:
        answer = await ask(here.stranger, spec, **headers)
        if spec.scopes:
            refused(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
        else:
            assert answer.status_code in (200, 404)


async def test_the_way_a_key_is_written_may_vary(here: World) -> None:
    """The scheme's name is case-insensitive, and spaces around the key are ignored."""
    for authorization in (f"bearer {ADMIN_KEY}", f"BEARER   {ADMIN_KEY}"):
        got(await here.stranger.get("/v1/tasks", headers={"authorization": authorization}))


async def test_only_the_beginning_of_a_key_of_ours_is_logged(here: World) -> None:
    """A rejected key may be a secret of another system. The log shows a prefix only of a key that
    has Darkroom's own form.
    """
    with capture_logs() as lines:
        for key in (
            "Bearer dk_abcdefghijklmnop",
            "Bearer sk-another-service",
            "Bearer short",
            "dk_naked",
        ):
            await here.stranger.get("/v1/tasks", headers={"authorization": key})
        async with here.owner("submit", name="sub") as client:
            await client.get("/v1/tasks")
    told = [line for line in lines if line["event"] == "auth.refused"]
    assert [line.get("hint") for line in told] == ["dk_abcde", None, None, None, None]
    assert [line["reason"] for line in told] == ["no valid key"] * 4 + ["needs read"]
    assert told[-1]["owner"] == "sub"


# --- owners
# --------------------------------------------------------------------------------------------------


async def test_two_keys_of_one_owner_see_the_same(here: World) -> None:
    """Tasks and endpoints belong to owners, not to keys."""
    async with here.owner(name="duo") as one, here.owner("read", name="duo") as two:
        task = await submitted(one)
        assert got(await two.get(f"/v1/tasks/{task['id']}"))["id"] == task["id"]


async def test_an_endpoint_for_all_owners_shows_its_deliveries_to_admins_alone(here: World) -> None:
    """An owner's timeline and deliveries do not reveal other subscribers."""
    async with here.owner() as client, subscriber() as takes:
        everybodys = got(
            await here.client.post("/v1/endpoints", json={"url": takes.url, "owner": None}), 201
        )
        task = await submitted(client, UNTIL_DONE)

        async def delivered() -> bool:
            query = {"endpoint": everybodys["id"], "task": task["id"], "state": "delivered"}
            return len(got(await here.client.get("/v1/deliveries", params=query))["data"]) == 2

        await wait_until(delivered)
        assert got(await client.get("/v1/deliveries"))["data"] == []
        steps = got(await client.get(f"/v1/tasks/{task['id']}/timeline"))["data"]
        assert "delivery.attempted" not in [step["step"] for step in steps]
        assert "delivery.attempted" in [step["step"] for step in await here.steps(task["id"])]
        await here.client.delete(f"/v1/endpoints/{everybodys['id']}")


# --- keys
# --------------------------------------------------------------------------------------------------


async def made(here: World, owner: str, *scopes: str) -> JSON:
    return got(await here.client.post("/v1/keys", json={"owner": owner, "scopes": scopes}), 201)


async def test_a_key_is_shown_once_and_kept_as_its_hash(here: World) -> None:
    """The list shows only the key's prefix. The owner's first key brings the callback secret with
    it, later keys do not.
    """
    first, second = await made(here, "kim", "read"), await made(here, "kim", "submit", "subscribe")
    assert re.fullmatch("dk_[a-z2-7]{40}", first["key"])
    assert re.fullmatch("whsec_[A-Za-z0-9+/]{43}=", first["callback_secret"])
    assert second["callback_secret"] is None
    assert first == {
        "id": first["id"],
        "owner": "kim",
        "hint": first["key"][:8],
        "scopes": ["read"],
        "created_at": first["created_at"],
        "revoked_at": None,
        "key": first["key"],
        "callback_secret": first["callback_secret"],
        "budget": None,
    }
    assert re.fullmatch(an_id("key"), first["id"])
    assert re.fullmatch(TIME, first["created_at"])
    listed = await here.client.get("/v1/keys")
    shown = [key for key in got(listed)["data"] if key["owner"] == "kim"]
    assert shown == [
        {name: key[name] for name in key if name not in ONCE} for key in (second, first)
    ]
    assert first["key"] not in listed.text
    assert ADMIN_KEY not in listed.text


async def test_keys_are_listed_newest_first_in_pages(here: World) -> None:
    ids = [(await made(here, "pat", "read"))["id"] for _ in range(3)]
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 2}
    while query:
        page = got(await here.client.get("/v1/keys", params=query))
        seen += [key["id"] for key in page["data"]]
        query = {"limit": 2, "cursor": page["next_cursor"]} if page["next_cursor"] else {}
    assert seen[:3] == ids[::-1]
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"owner": "x"}, "scopes"),
        ({"scopes": ["read"]}, "owner"),
        ({"owner": "x", "scopes": []}, "scopes"),
        ({"owner": "x", "scopes": ["write"]}, "scopes.0"),
        ({"owner": "x", "scopes": "read"}, "scopes"),
        ({"owner": "X", "scopes": ["read"]}, "owner"),
        ({"owner": "x\n", "scopes": ["read"]}, "owner"),
        ({"owner": "-x", "scopes": ["read"]}, "owner"),
        ({"owner": "x" * 65, "scopes": ["read"]}, "owner"),
        ({"owner": "admin", "scopes": ["read", "subscribe"]}, "scopes"),
        ({"owner": "x", "scopes": ["read"], "key": "mine"}, "key"),
    ],
)
async def test_an_invalid_key_is_refused_by_name(here: World, body: JSON, param: str) -> None:
    """The owner `admin` receives the operators' events, so its keys need the scope `admin`."""
    refused(await here.client.post("/v1/keys", json=body), 400, "invalid_request", param=param)


async def test_a_key_made_with_admin_does_everything(here: World) -> None:
    """`admin` implies every scope under any owner, and it sees every owner's data."""
    async with here.owner() as client, here.owner("admin", name="root") as root:
        task = await submitted(client)
        assert got(await root.get(f"/v1/tasks/{task['id']}"))["id"] == task["id"]
        assert (await submitted(root))["state"] != "failed"
        got(await root.get("/v1/keys"))


async def test_a_revoked_key_ends_within_five_seconds(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process caches a key for less than five seconds. A second revocation changes nothing, and
    an unknown key is 404.
    """
    assert auth.CACHE_S < 5
    monkeypatch.setattr(auth, "CACHE_S", 0.05)
    key = await made(here, "rev", "read")
    async with here.with_key(key["key"]) as client:
        got(await client.get("/v1/tasks"))
        for _ in range(2):
            assert (await here.client.delete(f"/v1/keys/{key['id']}")).status_code == 204

        async def ended() -> bool:
            return (await client.get("/v1/tasks")).status_code == 401

        await wait_until(ended)
    (shown,) = [
        each for each in got(await here.client.get("/v1/keys"))["data"] if each["id"] == key["id"]
    ]
    assert re.fullmatch(TIME, shown["revoked_at"])
    refused(await here.client.delete("/v1/keys/key_unknown"), 404, "key_not_found")


async def test_many_keys_do_not_fill_the_memory(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of valid and invalid keys has a limit. Beyond it the process asks the store
    again.
    """
    monkeypatch.setattr(auth, "CACHE_KEYS", 2)
    async with here.owner() as client:
        for number in range(5):
            await here.stranger.get("/v1/tasks", headers={"authorization": f"Bearer dk_{number}"})
            got(await client.get("/v1/tasks"))
    assert len(here.context.access._cache) <= 2


async def test_without_an_admin_key_there_is_none(tmp_path: Path) -> None:
    """With the setting unset, the service rejects every key that looks like an admin key."""
    async with world(tmp_path, admin_key=None) as here:
        refused(await here.client.get("/v1/tasks"), 401, "unauthorized")
