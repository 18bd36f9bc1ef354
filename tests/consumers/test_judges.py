"""The Python and JavaScript libraries of Standard Webhooks and of Svix verify the webhooks that
subscribers get.
"""

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import standardwebhooks

from tests.api import UNTIL_DONE, got, submitted
from tests.consumers.programs import judged
from tests.waiting import wait_until
from tests.world import Received, subscriber, world

BOTH = "standardwebhooks svix"
Judge = Callable[[Sequence[tuple[str, Received]], Path], list[str]]


def in_python(asked: Sequence[tuple[str, Received]], _folder: Path) -> list[str]:
    return [
        " ".join(name for name in BOTH.split() if accepted(name, secret, request))
        for secret, request in asked
    ]


def accepted(library: str, secret: str, request: Received) -> bool:
    import svix.webhooks  # which takes half a second

    made = (
        standardwebhooks.Webhook(secret)
        if library == "standardwebhooks"
        else svix.webhooks.Webhook(secret)
    )
    try:
        made.verify(request.body, dict(request.headers))
    except standardwebhooks.WebhookVerificationError:
        return False
    return True


def in_javascript(asked: Sequence[tuple[str, Received]], folder: Path) -> list[str]:
    requests = [
        {
            "secret": secret,
            "headers": dict(request.headers),
            "body": base64.b64encode(request.body).decode(),
        }
        for secret, request in asked
    ]
    return judged("verify.mjs", "\n".join(map(json.dumps, requests)), folder).splitlines()


@pytest.mark.parametrize("judge", [in_python, in_javascript])
async def test_the_libraries_accept_what_is_sent_also_while_secrets_overlap(
    tmp_path: Path, judge: Judge
) -> None:
    """The libraries verify events and a task's own callback. During a rotation both secrets verify,
    and after the overlap only the new one does.
    """
    async with world(tmp_path) as here, subscriber() as shop:
        key = got(
            await here.client.post(
                "/v1/keys", json={"owner": "shop", "scopes": ["submit", "read", "subscribe"]}
            ),
            201,
        )
        async with here.with_key(key["key"]) as client:

            async def sent(count: int) -> list[Received]:
                """The webhooks of one more task."""
                before = len(shop.received)
                await submitted(
                    client,
                    UNTIL_DONE,
                    metadata={"order": "七\u2028 \U0001f4f7"},
                    callback_url=f"{shop.url}/own",
                )
                await wait_until(lambda: len(shop.received) >= before + count)
                return shop.received[before:]

            endpoint = got(
                await client.post("/v1/endpoints", json={"url": f"{shop.url}/hooks"}), 201
            )
            first, own = key["callback_secret"], f"/v1/endpoints/{endpoint['id']}/rotate"
            plain = await sent(3)
            second = got(await client.post(own))["secret"]
            overlapping = await sent(3)
            last = got(await client.post(own, json={"overlap_s": 0}))["secret"]
            alone = await sent(3)
    old = endpoint["secret"]
    cases: list[tuple[str, Received, bool]] = []
    for requests, valid in ((plain, {old}), (overlapping, {old, second}), (alone, {last})):
        for request in requests:
            own_address = request.path == "/own"
            right = {first} if own_address else valid
            openly = 0 if own_address else 1  # v1a
            assert len(request.headers["webhook-signature"].split()) == len(right) + openly
            cases += [(secret, request, secret in right) for secret in (first, old, second, last)]
    assert len(cases) == 3 * 3 * 4
    verdicts = judge([(secret, request) for secret, request, _ in cases], tmp_path)
    assert verdicts == [BOTH if valid else "" for _, _, valid in cases]
