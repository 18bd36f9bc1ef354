"""Hosts of endpoints and of callback_urls: names that no library can encode are refused, and no
message tells an address that a name has. Whatever prevents an attempt is a failed attempt.
"""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from ipaddress import ip_network
from typing import Any

import pytest
from structlog.testing import capture_logs

from service.db.transaction import Emitted, Transaction
from service.errors import EgressError, EgressRefused
from service.events.endpoints import NewEndpointRow, insert_endpoints
from service.net.egress_client import Egress, Rules
from tests.api import SUBMIT, got, order, refused
from tests.outbox import emitted
from tests.waiting import wait_until
from tests.world import World, world

JSON = dict[str, Any]
BAD_HOSTS = (
    *("xn--a", "xn--0", "xn--zzzzzzzz", "xn--", "XN--A", "xn--a.", "xn--a-.example"),
    *("shop.xn--a.example", "xn--a.xn--p1ai", "xn--ls8h.example", "xn--\u00fc.example"),
)
INTERNAL = (
    *("10.1.2.3", "172.16.0.9", "192.168.7.7", "127.0.0.1", "169.254.169.254", "198.18.0.5"),
    *("fd00::1", "::1", "fe80::1", "::ffff:10.1.2.3", "64:ff9b::a01:203", "2002:a01:203::1"),
)


@pytest.fixture(scope="module")
async def strict(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A world without networks of its own."""
    folder = tmp_path_factory.mktemp("strict")
    async with world(
        folder,
        endpoint_networks=None,
        task_callback_networks=None,
        endpoint_disable_after_s=0.02,
        delivery_schedule="0.05,0.05,0.05",
    ) as made:
        yield made


# --- hosts that no library can encode ---


@pytest.mark.parametrize("host", BAD_HOSTS)
async def test_a_host_that_does_not_decode_is_refused_by_name(strict: World, host: str) -> None:
    """In a new endpoint, in a changed one and in a task's callback_url."""
    url = f"https://{host}/hook"
    endpoint = got(
        await strict.client.post("/v1/endpoints", json={"url": "https://203.0.114.1/"}), 201
    )
    path = f"/v1/endpoints/{endpoint['id']}"
    answers = (
        (await strict.client.post("/v1/endpoints", json={"url": url}), "url"),
        (await strict.client.patch(path, json={"url": url}), "url"),
        (await strict.client.post(SUBMIT, json=order(callback_url=url)), "callback_url"),
    )
    await strict.client.delete(path)
    for answer, param in answers:
        error = refused(answer, 400, "invalid_parameter", param=param)
        assert f"the host {host} of the URL is not valid" in error["message"]


@pytest.mark.parametrize(
    "host",
    ["xn--nxasmq6b.example", "münchen.example", "xn--p1ai", "a--b.example", "r3---sn.example"],
)
async def test_a_host_that_decodes_is_taken(strict: World, host: str) -> None:
    answer = await strict.client.post("/v1/endpoints", json={"url": f"https://{host}/"})
    await strict.client.delete(f"/v1/endpoints/{got(answer, 201)['id']}")


# --- attempts that cannot be prepared ---


def emit_bare(tx: Transaction, owners: Sequence[str]) -> list[str]:
    """Events that nothing can render, because their data lists images that are none."""
    ids = [tx.id("event") for _ in owners]
    for id, owner in zip(ids, owners, strict=True):
        tx.emitted.append(Emitted(id, owner, "image.task.failed", None, {"images": [None]}))
    return ids


async def stored(here: World, owner: str, url: str, secret: str = "whsec_" + "QUJD" * 8) -> str:
    """An endpoint as an older version or another program may have stored it."""
    resources = here.context.resources
    id = resources.id("endpoint")
    row = NewEndpointRow(id, owner, url, ("*",), "", resources.keyring.encrypt(secret))
    assert await resources.store.write(insert_endpoints, row)
    return id


CASES: dict[str, tuple[str, str, str]] = {
    "host": ("https://xn--a/", "", "the host xn--a of the URL is not valid"),
    "first label": ("https://xn--0.example/", "", "the host xn--0.example of the URL is not valid"),
    "no url": ("nonsense", "", "only http and https URLs are fetched"),
    "half an address": ("https://[::1/", "", "the host or port of the URL is not valid"),
    "secret": ("https://203.0.114.1/", "whsec_!", "ValueError: a webhook secret is whsec_ and"),
    "secret list": ("https://203.0.114.1/", "{", "JSONDecodeError"),
    "event": ("https://203.0.114.1/", "", "not sent, TypeError"),
}


def tried(lines: Sequence[Mapping[str, Any]], owner: str) -> list[Mapping[str, Any]]:
    """The log lines of attempts for this owner. They come after the commits."""
    mine = [line for line in lines if line.get("owner") == owner]
    return [line for line in mine if line["event"] == "delivery.attempted"]


@pytest.mark.parametrize("case", CASES)
async def test_an_attempt_that_cannot_be_prepared_is_a_failed_attempt(
    strict: World, case: str
) -> None:
    """It is recorded with its reason and counts towards disabling the endpoint. Its log line is
    that of every attempt, without a traceback. A test and an attempt by hand answer with it.
    """
    url, secret, reason = CASES[case]
    owner = f"odd-{case.replace(' ', '-')}"
    async with strict.owner(name=owner) as client:
        endpoint = await stored(strict, owner, url, *([secret] if secret else []))
        with capture_logs() as lines:
            store = strict.context.resources.store
            if case == "event":
                await store.write(emit_bare, owner)
            else:
                await emitted(store, 1, owner=owner)

            async def ended() -> JSON | None:
                shown = got(await client.get(f"/v1/endpoints/{endpoint}"))
                return shown if shown["status"] == "disabled" else None

            shown = await wait_until(ended)
            (delivery,) = got(await client.get("/v1/deliveries"))["data"]
            await wait_until(lambda: len(tried(lines, owner)) >= len(delivery["attempts"]))
        assert shown["disabled_reason"].startswith("every attempt failed since 20")
        assert delivery["state"] == "dead"
        assert len(delivery["attempts"]) >= 2
        assert all(reason in attempt["error"] for attempt in delivery["attempts"])
        assert all(attempt["status"] is None for attempt in delivery["attempts"])
        assert len(tried(lines, owner)) == len(delivery["attempts"])
        assert [line for line in lines if line["event"] == "worker.failed"] == []
        before = len(delivery["attempts"])
        again = got(await client.post(f"/v1/deliveries/{delivery['id']}/retry"))
        assert len(again["attempts"]) == before + 1
        assert reason in again["attempts"][-1]["error"]
        if case != "event":
            tested = got(await client.post(f"/v1/endpoints/{endpoint}/test"))
            assert (tested["status"], reason in tested["error"]) == (None, True)


# --- addresses of names ---


async def test_a_refusal_names_the_rule_and_not_the_address_of_a_name(strict: World) -> None:
    """The address is in the log, for the operator."""
    url = "https://localhost/hook"
    with capture_logs() as lines:
        answers = [
            await strict.client.post("/v1/endpoints", json={"url": url}),
            await strict.client.post(SUBMIT, json=order(callback_url=url)),
        ]
    for answer in answers:
        error = refused(
            answer, 400, "invalid_parameter", param=json.loads(answer.text)["error"]["param"]
        )
        assert "localhost: its address is not globally routable" in error["message"]
        assert "127.0.0.1" not in answer.text
        assert "::1" not in answer.text
    told = {line["reason"] for line in lines if line["event"] == "egress.refused"}
    assert len(told) == 2
    assert all("127.0.0.1" in reason or "::1" in reason for reason in told)


async def test_an_attempt_at_a_name_tells_its_owner_no_address(strict: World) -> None:
    """Neither a refused attempt nor one that is not connected."""
    async with strict.owner(name="curious") as client:
        await stored(strict, "curious", "https://localhost/")
        await emitted(strict.context.resources.store, 1, owner="curious")

        async def tried() -> str | None:
            found = got(await client.get("/v1/deliveries"))["data"]
            return json.dumps(found) if found and found[0]["attempts"] else None

        shown = await wait_until(tried)
    assert "localhost: its address is not globally routable" in shown
    assert "127.0.0.1" not in shown


@pytest.mark.parametrize("address", INTERNAL)
async def test_no_internal_address_of_a_name_is_in_the_message(address: str) -> None:
    logged: list[str] = []

    async def resolve(_: str) -> Sequence[str]:
        return ["203.0.114.1", address]

    rules = Rules("endpoints")
    async with Egress(
        rules, resolve=resolve, on_refused=lambda *what: logged.append(what[2])
    ) as egress:
        for call in (
            egress.check("https://db.internal/"),
            egress.request("POST", "https://db.internal/", timeout=2),
        ):
            with pytest.raises(EgressRefused) as caught:
                await call
            text = str(caught.value)
            assert text.startswith("db.internal: its address ")
            assert not [part for part in (address, "10.1.2.3", "203.0.114.1") if part in text]
    assert len(logged) == 2
    assert all(reason.split()[0] in (address, "::ffff:a01:203") for reason in logged)


async def test_a_failed_connection_names_no_address() -> None:
    """The name resolves into a network that the service may reach, where nothing listens."""
    networks = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
    async with Egress(Rules("endpoints", networks)) as egress:
        with pytest.raises(EgressError) as caught:
            await egress.request("POST", "http://localhost:9/", timeout=5)
    assert str(caught.value).startswith("localhost: ")
    assert not [part for part in ("127.0.0.1", "::1") if part in str(caught.value)]
