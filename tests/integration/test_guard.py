"""The egress rules in the running service: it connects to no forbidden address in a URL, a name or
a redirect.
"""

import re
from collections.abc import AsyncIterator, Iterator, Sequence
from ipaddress import ip_network
from itertools import cycle
from typing import Any

import pytest
from starlette.responses import Response

from service.errors import ConnectionLost, EgressRefused
from service.events.endpoints import DeliveryAttempt
from service.events.outbox import DeliveryToSend
from service.net.egress_client import Egress, Rules
from service.upstreams.base import NoAnswer, NotCreated
from service.upstreams.evolink import EvoLink
from tests.api import SUBMIT, got, order, refused
from tests.hostile import HOSTILE, LITERAL, NAMES, Guarded, guarded, linked
from tests.traps import connects, trap
from tests.upstream import failed, picture
from tests.waiting import wait_until
from tests.world import World

JSON = dict[str, Any]


async def sent_to(here: World, url: str, *, endpoint_id: str | None) -> DeliveryAttempt:
    """Sends a delivery to an endpoint, or to a task's own address, without the checks of the
    API.
    """
    secret = here.context.resources.keyring.encrypt("whsec_" + "A" * 32)
    event = {
        "id": "evt_x",
        "sequence": 1,
        "type": "endpoint.test",
        "task_id": None,
        "time": 0,
        "traceparent": None,
        "data": {"endpoint_id": "ep_x"},
    }
    delivery = DeliveryToSend(
        "dlv_x", "admin", endpoint_id, None, "pending", url, secret, None, None, event
    )
    return await here.context.sender.send(delivery)


@pytest.fixture(scope="module")
async def there(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guarded]:
    async with guarded(tmp_path_factory.mktemp("guard")) as made:
        yield made


@pytest.fixture
def here(there: Guarded) -> Iterator[World]:
    """The world. The test fails if the service connects to anything other than itself and its
    upstream.
    """
    with there.watched():
        yield there.world


# --- one table for each purpose
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", HOSTILE)
async def test_no_endpoint_leads_inside(url: str, here: World, there: Guarded) -> None:
    """The API neither creates nor changes an endpoint with a forbidden URL, and the sender refuses
    to deliver to one.
    """
    url, before = url.format(port=there.trap.port), there.refusals("endpoints")
    refused(
        await here.client.post("/v1/endpoints", json={"url": url}),
        400,
        "invalid_parameter",
        param="url",
    )
    kept = got(await here.client.post("/v1/endpoints", json={"url": "https://unknown.test/"}), 201)
    refused(
        await here.client.patch(f"/v1/endpoints/{kept['id']}", json={"url": url}),
        400,
        "invalid_parameter",
        param="url",
    )
    assert (await here.client.delete(f"/v1/endpoints/{kept['id']}")).status_code == 204
    sent = await sent_to(here, url, endpoint_id="ep_x")
    assert (sent.status, (sent.error or "").split(":")[0]) == (None, "EgressRefused")
    assert there.refusals("endpoints") == before + 3


@pytest.mark.parametrize("url", HOSTILE)
async def test_no_callback_url_of_a_task_leads_inside(
    url: str, here: World, there: Guarded
) -> None:
    """The service refuses a submission with a forbidden `callback_url` before it stores or pays for
    it. The sender refuses the address too.
    """
    url, before = url.format(port=there.trap.port), there.refusals("task_callbacks")
    refused(
        await here.client.post(SUBMIT, json=order(prompt="hostile", callback_url=url)),
        400,
        "invalid_parameter",
        param="callback_url",
    )
    assert "hostile" not in there.upstream.received
    sent = await sent_to(here, url, endpoint_id=None)
    assert (sent.status, (sent.error or "").split(":")[0]) == (None, "EgressRefused")
    assert there.refusals("task_callbacks") == before + 2


@pytest.mark.parametrize("url", [url for url in HOSTILE if "\r" not in url])
async def test_no_call_to_the_upstream_leads_inside(url: str, here: World, there: Guarded) -> None:
    """The adapter sends no submission, query or passed-through call to a forbidden address. It
    reports that nothing was created.
    """
    usual = here.context.resources.upstreams["evolink"]
    assert isinstance(usual, EvoLink)
    upstream = EvoLink(usual._answers._egress, url.format(port=there.trap.port), "sk-secret", 5, 5)
    assert await upstream.submit(b"{}", "task_x") == NotCreated("refused by the guard")
    assert await upstream.query("task-unified-1") == NoAnswer("refused by the guard")
    with pytest.raises(EgressRefused):
        await upstream.passthrough("GET", "/v1/credits")


def chunked(rows: Sequence[str], size: int = 40) -> list[Sequence[str]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@pytest.mark.parametrize("urls", chunked(LITERAL))
async def test_no_result_leads_inside(urls: Sequence[str], here: World, there: Guarded) -> None:
    """No result at a forbidden address is fetched: it is lost at once, or waits for another link if
    its text cannot be read. The task's result at an allowed address is stored.
    """
    there.upstream.files["good"] = [Response(picture(), media_type="image/png")]
    before = there.refusals("results")
    links = [url.format(port=there.trap.port) for url in urls]
    task = await there.storing(f"{here.sandbox_url}/files/good", *links)
    await wait_until(lambda: there.refusals("results") >= before + len(links))

    async def stored() -> list[JSON]:
        found = await here.task(task["id"])
        return list(found["images"]) if found["state"] in ("storing", "failed") else []

    assert [image["index"] for image in await wait_until(stored)] == [0]
    await here.client.post(f"/v1/tasks/{task['id']}/cancel")


@pytest.mark.parametrize(
    "urls", chunked([url for url in LITERAL if not re.search(r"[\r\x7f]|^//|^https:12", url)])
)
async def test_no_redirect_of_a_result_leads_inside(
    urls: Sequence[str], here: World, there: Guarded
) -> None:
    """A result that redirects to a forbidden address, directly or over another redirect, waits, for
    every redirect status. The host may redirect elsewhere later.
    """
    before, links = there.refusals("results"), []
    for number, (url, status) in enumerate(
        zip(urls, cycle((301, 302, 303, 307, 308)), strict=False)
    ):
        location = url.format(port=there.trap.port).encode().decode("latin-1")
        there.upstream.files[f"there-{number}"] = [
            Response(status_code=status, headers={"location": location})
        ]
        there.upstream.files[f"here-{number}"] = [
            Response(status_code=status, headers={"location": f"/files/there-{number}"})
        ]
        links.append(f"{here.sandbox_url}/files/{('here', 'there')[number % 2]}-{number}")
    task = await there.storing(*links)
    await wait_until(lambda: there.refusals("results") >= before + 2 * len(links))
    assert (await here.task(task["id"]))["state"] == "storing"
    assert (await here.client.post(f"/v1/tasks/{task['id']}/cancel")).status_code == 200


@pytest.mark.parametrize("redirected", [False, True])
async def test_no_name_of_a_result_leads_inside(
    redirected: bool, here: World, there: Guarded
) -> None:
    """A name with a forbidden address is refused at every attempt. The result waits, because the
    name server may be corrected.
    """
    links = [url.format(port=there.trap.port) for url in linked(NAMES)]
    if redirected:
        for number, url in enumerate(links):
            location = url.encode().decode("latin-1")
            there.upstream.files[f"name-{number}"] = [
                Response(status_code=302, headers={"location": location})
            ]
        links = [f"{here.sandbox_url}/files/name-{number}" for number in range(len(links))]
    before = there.refusals("results")
    task = await there.storing(*links)
    await wait_until(lambda: there.refusals("results") >= before + 3 * len(links))
    assert (await here.task(task["id"]))["state"] == "storing"
    assert (await here.client.post(f"/v1/tasks/{task['id']}/cancel")).status_code == 200


# --- names that change, redirects, keys
# -------------------------------------------------------------------------------


async def failed_deliveries(here: World, count: int, **query: str) -> list[JSON]:
    """Waits until `count` deliveries are dead and returns them."""

    async def look() -> list[JSON]:
        found = got(await here.client.get("/v1/deliveries", params={**query, "state": "dead"}))[
            "data"
        ]
        return found if len(found) == count else []

    found: list[JSON] = await wait_until(look)
    return found


async def test_a_name_that_changes_after_its_check_is_not_delivered_to(
    here: World, there: Guarded
) -> None:
    """The names are public when the endpoint and the task are created, and private at delivery. The
    sender refuses every attempt.
    """
    there.names.zone |= {
        "turn.test": [["1.1.1.1"], ["127.0.0.2"]],
        "turned.test": [["1.1.1.1"], ["1.1.1.1", "127.0.0.2"]],
    }
    endpoint = got(
        await here.client.post(
            "/v1/endpoints",
            json={"url": f"https://turn.test:{there.trap.port}/", "types": ["image.task.failed"]},
        ),
        201,
    )
    task = await here.submit(callback_url=f"https://turned.test:{there.trap.port}/")
    await there.calls_back(task, failed("service_error"))
    found = await failed_deliveries(here, 2, task=task["id"])
    assert {each["endpoint"] for each in found} == {endpoint["id"], None}
    for each in found:
        assert [attempt["error"].split(":")[0] for attempt in each["attempts"]] == [
            "EgressRefused"
        ] * 3
    assert (await here.client.delete(f"/v1/endpoints/{endpoint['id']}")).status_code == 204


@pytest.mark.usefixtures("here")
async def test_a_result_whose_name_changes_is_not_fetched(there: Guarded) -> None:
    """The service looks up an http link to choose the scheme, and again to connect. It checks the
    second lookup too.
    """
    there.names.zone["turn.evil.test"] = [["1.1.1.1"], ["127.0.0.2"]]
    before = there.refusals("results")
    task = await there.storing(f"http://turn.evil.test:{there.trap.port}/x")
    await wait_until(lambda: there.refusals("results") >= before + 2)
    world = there.world
    assert (await world.task(task["id"]))["state"] == "storing"
    assert (await world.client.post(f"/v1/tasks/{task['id']}/cancel")).status_code == 200


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_calls_to_the_upstream_follow_no_redirect(
    status: int, here: World, there: Guarded
) -> None:
    """The adapter follows no redirect, even to an allowed address, because its key is for the
    upstream alone. A redirected submission is uncertain.
    """
    away = Response(
        status_code=status,
        headers={"location": f"http://127.0.0.1:{there.trap.port}/v1/tasks/task-unified-x"},
    )
    there.upstream.submits["sent on"], there.upstream.queries["task-unified-away"] = [away], [away]
    task = await here.submit(prompt="sent on")

    async def uncertain() -> bool:
        return bool((await here.task(task["id"]))["state"] == "uncertain")

    await wait_until(uncertain)
    refused(await here.client.get("/v1/tasks/task-unified-away"), 503)


# --- the proof itself
# -------------------------------------------------------------------------------------------------


async def test_a_guard_that_allows_this_machine_is_seen_to_connect() -> None:
    """The trap and the trail record a connection. With open networks the same send reaches the
    trap.
    """
    async with trap() as other:
        with connects() as trail:
            async with Egress(Rules("endpoints", networks=(ip_network("127.0.0.1"),))) as egress:
                with pytest.raises(ConnectionLost):
                    await egress.request("POST", f"http://127.0.0.1:{other.port}/", timeout=5)
        assert (trail, other.connections) == ({("127.0.0.1", other.port)}, 1)
