"""`DARKROOM_SECRET_KEY`: after a rotation the service encrypts the stored secrets under the new
key. The service never replaces a lost key.
"""

import secrets
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from structlog.testing import capture_logs

from service.app import Role, running
from service.errors import ConfigurationError
from service.events.secrets import SecretChange, change_secrets, stored_secrets
from service.upkeep import rekey
from tests.api import ASYNC, UNTIL_DONE, got, submitted
from tests.waiting import wait_until
from tests.world import Subscriber, World, subscriber, world

pytestmark = pytest.mark.slow

OLD, NEW = secrets.token_urlsafe(32), secrets.token_urlsafe(32)


async def at_rest(here: World) -> list[bytes]:
    read = here.context.resources.store.read
    return [
        secret
        for table in ("endpoints", "owners")
        for _, secret in await read(stored_secrets, table, "", 100)
    ]


def signed(shop: Subscriber, path: str, secret: str) -> bool:
    (request,) = [request for request in shop.received if request.path == path]
    return request.signed_by(secret)


async def test_the_old_key_can_be_dropped_after_a_start_with_the_new_one_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service starts three times: with the old key, with the new key before the old one, and
    with the new key alone. The secrets stay the same and still sign.
    """
    monkeypatch.setattr(rekey, "PAGE", 2)
    async with subscriber() as shop:
        async with world(tmp_path, secret_key=OLD) as here:
            made = [
                got(await here.client.post("/v1/endpoints", json={"url": f"{shop.url}/{n}"}), 201)
                for n in range(3)
            ]
            key = got(
                await here.client.post("/v1/keys", json={"owner": "studio", "scopes": ["submit"]}),
                201,
            )
            before = await at_rest(here)
        with capture_logs() as lines:
            async with world(tmp_path, secret_key=f"{NEW},{OLD}") as here:
                await wait_until(lambda: any(line["event"] == "secrets.rekeyed" for line in lines))
                after = await at_rest(here)
                assert await rekey.rekey(here.context.resources) == 0
        assert len(before) == len(after)
        assert not set(before) & set(after)
        assert {
            line["event"]: line["count"] for line in lines if line["event"].startswith("secrets.")
        } == {"secrets.rekeyed": len(after)}
        async with world(tmp_path, secret_key=NEW) as here:
            await submitted(here.client, UNTIL_DONE)
            async with here.with_key(key["key"]) as client:
                await submitted(client, UNTIL_DONE, callback_url=f"{shop.url}/own")
            await wait_until(
                lambda: {request.path for request in shop.received} >= {"/0", "/1", "/2", "/own"}
            )
        assert signed(shop, "/own", key["callback_secret"])
        hooks = [request for request in shop.received if request.path == "/1"]
        assert hooks
        assert all(request.signed_by(made[1]["secret"]) for request in hooks)


async def test_secrets_that_no_key_fits_are_told_and_left_alone(tmp_path: Path) -> None:
    """The operator dropped the old key too early. The service logs the unreadable secrets and
    leaves them unchanged, so the old key still opens them.
    """
    async with world(tmp_path, secret_key=OLD) as here:
        got(await here.client.post("/v1/endpoints", json={"url": "http://127.0.0.1:9/"}), 201)
        before = await at_rest(here)
    with capture_logs() as lines:
        async with world(tmp_path, secret_key=NEW) as here:
            await wait_until(lambda: any(line["event"] == "secrets.unreadable" for line in lines))
            assert await at_rest(here) == before
    (line,) = [line for line in lines if line["event"] == "secrets.unreadable"]
    assert (line["count"], line["log_level"]) == (len(before), "error")


async def test_where_a_key_is_lost_for_good_other_secrets_are_the_way_out(tmp_path: Path) -> None:
    """The service sends no delivery without a readable secret and does not disable the endpoint.
    After the client rotates both secrets, deliveries are signed again.
    """
    async with subscriber() as shop:
        async with world(tmp_path, secret_key=OLD) as here:
            made = await here.client.post("/v1/endpoints", json={"url": f"{shop.url}/hook"})
            path = f"/v1/endpoints/{got(made, 201)['id']}"
            key = got(
                await here.client.post(
                    "/v1/keys", json={"owner": "studio", "scopes": ["submit", "subscribe"]}
                ),
                201,
            )
        async with (
            world(tmp_path, secret_key=NEW, delivery_schedule="0.1,600") as here,
            here.with_key(key["key"]) as studio,
        ):
            attempt = got(await here.client.post(f"{path}/test"))
            assert (attempt["status"], attempt["error"].partition(":")[0]) == (
                None,
                "not sent, its secret cannot be read",
            )
            await submitted(here.client, UNTIL_DONE)
            await submitted(studio, UNTIL_DONE, callback_url=f"{shop.url}/own")

            async def tried() -> bool:
                found = got(await here.client.get("/v1/deliveries"))["data"]
                return (
                    all(len(each["attempts"]) == 2 and each["state"] == "pending" for each in found)
                    and len(found) == 3
                )

            await wait_until(tried)
            assert shop.received == []
            secret = got(await here.client.post(f"{path}/rotate"))["secret"]
            own = got(await studio.post("/v1/keys/rotate-secret"))["callback_secret"]
            assert got(await here.client.post(f"{path}/test"))["status"] == 204
            await submitted(studio, UNTIL_DONE, callback_url=f"{shop.url}/own")
            await wait_until(lambda: any(request.path == "/own" for request in shop.received))
        assert signed(shop, "/hook", secret)
        assert signed(shop, "/own", own)


async def test_a_secret_that_was_rotated_meanwhile_stays_as_it_is_now(tmp_path: Path) -> None:
    """A secret that changes after `rekey` has read it keeps its new value."""
    async with world(tmp_path, secret_key=OLD) as here:
        endpoint = got(
            await here.client.post("/v1/endpoints", json={"url": "http://127.0.0.1:9/"}), 201
        )["id"]
    async with world(tmp_path, secret_key=f"{NEW},{OLD}", role=Role(workers=False)) as here:
        resources = here.context.resources
        (held, *_) = await at_rest(here)
        write, now = resources.store.write, resources.keyring.encrypt("[]")

        async def late(operation: Any, item: Any) -> Any:
            """Changes the endpoint's secret before `rekey` writes."""
            if isinstance(item, SecretChange) and item.table == "endpoints":
                await write(change_secrets, SecretChange("endpoints", endpoint, held, now))
            return await write(operation, item)

        with patch.object(resources.store, "write", late):
            assert await rekey.rekey(resources) == len(await at_rest(here)) - 1
        assert (await at_rest(here))[0] == now


async def test_a_key_that_is_lost_is_not_replaced_by_another(tmp_path: Path) -> None:
    """Under a new key the service would reject the callbacks of running tasks. The start fails and
    asks for the old key. An unused store gets a new key.
    """
    async with world(tmp_path, role=Role(workers=False)) as here:
        key = here.settings.key_file
    key.unlink()
    async with world(tmp_path, role=Role(workers=False)) as here:
        task = await submitted(here.client, ASYNC)
        token = here.callback_url(task["id"]).rpartition("/")[2]
    kept = key.rename(tmp_path / "kept")
    with pytest.raises(ConfigurationError, match=r"secret\.key is missing, .* put back the key"):
        async with running(here.settings, Role()):
            raise AssertionError
    assert not key.exists()
    kept.rename(key)
    async with world(tmp_path, role=Role(workers=False)) as here:
        assert here.callback_url(task["id"]).endswith(token)
