"""The guard around the running service: whatever is written into a URL, a name or a redirect,
nothing forbidden is connected to.
"""

import re
from collections.abc import AsyncIterator, Iterator, Sequence
from ipaddress import ip_network
from itertools import cycle
from typing import Any

import pytest
from starlette.responses import Response

from service.errors import ConnectionLost, EgressRefused
from service.events.deliveries import DeliveryAttempt, DeliveryToSend
from service.net import Egress, Rules
from service.upstreams.base import NoAnswer, NotCreated
from service.upstreams.evolink import EvoLink
from tests.api import SUBMIT, got, order, refused
from tests.hostile import HOSTILE, Guarded, guarded
from tests.traps import connects, trap
from tests.upstream import failed, picture
from tests.waiting import wait_until
from tests.world import World

JSON = dict[str, Any]


async def sent_to(here: World, url: str, *, endpoint_id: str | None) -> DeliveryAttempt:
    """A delivery to an endpoint, or to a task's own address, whatever the store says."""
    secret = here.context.resources.keyring.encrypt("whsec_" + "A" * 32)
    event = {
        "id": "evt_x",
        "sequence": 1,
        "type": "endpoint.test",
        "task_id": None,
        "time": 0,
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
    """The world, in a test that ends with no connection made but to the service and its
    upstream.
    """
    with there.watched():
        yield there.world


# --- one table for each purpose
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", HOSTILE)
async def test_no_endpoint_leads_inside(url: str, here: World, there: Guarded) -> None:
    """An endpoint with a forbidden URL is neither made nor changed to, and what sends deliveries
    and test sends refuses it itself.
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
    """A submission with a forbidden `callback_url` is refused before anything is kept or paid, and
    the sender refuses it itself.
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
    """At a forbidden address nothing is submitted, asked for or passed through: nothing was
    created, and the key went nowhere.
    """
    usual = here.context.resources.upstreams["evolink"]
    assert isinstance(usual, EvoLink)
    upstream = EvoLink(usual._egress, url.format(port=there.trap.port), "sk-secret", 5, 5)
    assert await upstream.submit(b"{}", "task_x") == NotCreated("refused by the guard")
    assert await upstream.query("task-unified-1") == NoAnswer("refused by the guard")
    with pytest.raises(EgressRefused):
        await upstream.passthrough("GET", "/v1/credits")


def chunked(rows: Sequence[str], size: int = 40) -> list[Sequence[str]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@pytest.mark.parametrize("urls", chunked(HOSTILE))
async def test_no_result_leads_inside(urls: Sequence[str], here: World, there: Guarded) -> None:
    """Every result at a forbidden address is lost at once; one beside them is kept."""
    there.upstream.files["good"] = [Response(picture(), media_type="image/png")]
    before = there.refusals("results")
    links = [url.format(port=there.trap.port) for url in urls]
    task = await there.completed(f"{here.sandbox_url}/files/good", *links)
    assert (task["state"], task["error"]["code"], len(task["images"])) == (
        "failed",
        "results_lost",
        1,
    )
    assert there.refusals("results") == before + len(links)


@pytest.mark.parametrize(
    "urls", chunked([url for url in HOSTILE if not re.search(r"[\r\t]|^//|^https:12", url)])
)
async def test_no_redirect_of_a_result_leads_inside(
    urls: Sequence[str], here: World, there: Guarded
) -> None:
    """A result that sends us on to a forbidden address, at once or by way of another, is lost,
    whatever the status of the redirect.
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
    task = await there.completed(*links)
    assert (task["state"], task["error"]["code"], task["images"]) == ("failed", "results_lost", [])
    assert there.refusals("results") == before + len(links)


# --- names that change, redirects, keys
# -------------------------------------------------------------------------------


async def failed_deliveries(here: World, count: int, **query: str) -> list[JSON]:
    """The deliveries that were found dead, once there are so many."""

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
    """Public when the endpoint and the task were made, private when they are delivered to: refused
    at every attempt.
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
    """An http link is looked up to choose the scheme, and once more to connect: the second look is
    judged too.
    """
    there.names.zone["turn.evil.test"] = [["1.1.1.1"], ["127.0.0.2"]]
    task = await there.completed(f"http://turn.evil.test:{there.trap.port}/x")
    assert (task["state"], task["error"]["code"]) == ("failed", "results_lost")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_calls_to_the_upstream_follow_no_redirect(
    status: int, here: World, there: Guarded
) -> None:
    """Not even to an address that is allowed: the key is for who was asked. A submission that is
    sent on is uncertain.
    """
    away = Response(
        status_code=status,
        headers={"location": f"http://127.0.0.1:{there.trap.port}/v1/tasks/task-unified-x"},
    )
    there.upstream.submits["sent on"], there.upstream.queries["task-unified-away"] = [away], [away]
    task = await here.submit(prompt="sent on")
    assert task["state"] == "uncertain"
    refused(await here.client.get("/v1/tasks/task-unified-away"), 503)


# --- the proof itself
# -------------------------------------------------------------------------------------------------


async def test_a_guard_that_allows_this_machine_is_seen_to_connect() -> None:
    """Trap and trail notice a connection: where the networks are open, the same send arrives."""
    async with trap() as other:
        with connects() as trail:
            async with Egress(Rules("endpoints", networks=(ip_network("127.0.0.1"),))) as egress:
                with pytest.raises(ConnectionLost):
                    await egress.request("POST", f"http://127.0.0.1:{other.port}/", timeout=5)
        assert (trail, other.connections) == ({("127.0.0.1", other.port)}, 1)
