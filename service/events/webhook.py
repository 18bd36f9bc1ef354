"""Webhooks by the Standard Webhooks specification, version 1.0: `v1` signatures over
`id.timestamp.body`.
"""

import time
from collections.abc import Sequence
from contextlib import suppress

from service.errors import EgressError, NoPlace, NoRoute, NotConnected
from service.events.sinks import Sent
from service.net import Egress
from service.signing import sign_webhook

ANSWER_BYTES = 2048


class WebhookSink:
    """`Webhooks` through the guard."""

    def __init__(self, egress: Egress, timeout: float) -> None:
        self._egress = egress
        self._timeout = timeout

    async def send(
        self,
        url: str,
        id: str,
        timestamp: int,
        body: bytes,
        content_type: str,
        secrets: Sequence[str],
    ) -> Sent:
        headers = {
            "content-type": content_type,
            "webhook-id": id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": sign_webhook(secrets, id, timestamp, body),
        }
        started = time.perf_counter()
        try:
            answer = await self._egress.request(
                "POST",
                url,
                headers=headers,
                content=body,
                timeout=self._timeout,
                max_bytes=ANSWER_BYTES,
            )
        except EgressError as error:
            ours = isinstance(error, NoRoute | NoPlace)
            return Sent(
                None, time.perf_counter() - started, f"{type(error).__name__}: {error}", ours=ours
            )
        problem = None if 200 <= answer.status < 300 else f"answered {answer.status}"
        return Sent(
            answer.status, answer.duration, problem, answer.headers.get("retry-after"), answer.body
        )

    async def check(self, url: str) -> None:
        with suppress(NotConnected):
            await self._egress.check(url)
