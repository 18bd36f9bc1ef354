"""Webhooks by the Standard Webhooks specification, version 1.0: `v1` signatures over
`id.timestamp.body`.
"""

import time
from dataclasses import dataclass

from service.db.paging import Row
from service.errors import ConfigurationError, EgressError, NoPlace, NoRoute
from service.events.documents import event_document
from service.events.event_queries import Parcel
from service.events.feed import render, written
from service.events.secrets import valid_secrets
from service.net import Egress
from service.resources import Resources
from service.signing import sign_webhook
from service.strict_json import JSON

ANSWER_BYTES = 2048


@dataclass(frozen=True, slots=True)
class SendResult:
    """One request. `status` is None if no response came, and `error` says why. `retry_after` is
    the response's header, `answer` its first 2 KiB.

    `ours`: the fault is on this side and says nothing about the subscriber.
    """

    status: int | None
    duration: float
    error: str | None = None
    retry_after: str | None = None
    answer: bytes = b""
    ours: bool = False


@dataclass(frozen=True, slots=True)
class WebhookSender:
    """Sends one signed request per call. A fault of the network is a result, not an exception."""

    resources: Resources
    timeout_s: float

    async def send(self, parcel: Parcel, event: Row) -> SendResult:
        """Sends an event to the delivery's endpoint, or a task to its own callback_url."""
        document = render(event, self.resources.links)
        if parcel.endpoint is not None:
            return await self._send_to(parcel.endpoint, document)
        assert parcel.callback_url is not None
        assert parcel.callback_secret is not None
        return await self._post(
            self.resources.task_callbacks,
            parcel.callback_url,
            event["id"],
            document["data"],
            "application/json",
            parcel.callback_secret,
        )

    async def send_test(self, endpoint: Row) -> SendResult:
        """Sends an event that belongs to no task and is not in the outbox."""
        document = event_document(
            event_id=self.resources.id("event"),
            sequence=0,
            type="endpoint.test",
            subject=None,
            time=self.resources.clock(),
            data={"endpoint_id": endpoint["id"]},
            links=self.resources.links,
        )
        return await self._send_to(endpoint, document)

    async def _send_to(self, endpoint: Row, document: JSON) -> SendResult:
        return await self._post(
            self.resources.endpoints,
            endpoint["url"],
            document["id"],
            document,
            "application/cloudevents+json",
            endpoint["secret"],
        )

    async def _post(
        self,
        egress: Egress,
        url: str,
        id: str,
        document: JSON,
        content_type: str,
        encrypted_secrets: bytes,
    ) -> SendResult:
        now = self.resources.clock()
        try:
            secrets = valid_secrets(self.resources.keyring.decrypt(encrypted_secrets), now)
        except ConfigurationError as error:
            problem = f"not sent, its secret cannot be read: {error}"
            return SendResult(None, 0.0, problem, ours=True)
        return await post_webhook(
            egress,
            url,
            id,
            now // 1000,
            written(document).encode(),
            content_type,
            secrets,
            self.timeout_s,
        )


async def post_webhook(
    egress: Egress,
    url: str,
    id: str,
    timestamp: int,
    body: bytes,
    content_type: str,
    secrets: list[str],
    timeout_s: float,
) -> SendResult:
    """One POST with the Standard Webhooks headers, signed over the bytes sent. `timestamp` is in
    seconds.
    """
    headers = {
        "content-type": content_type,
        "webhook-id": id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": sign_webhook(secrets, id, timestamp, body),
    }
    started = time.perf_counter()
    try:
        answer = await egress.request(
            "POST", url, headers=headers, content=body, timeout=timeout_s, max_bytes=ANSWER_BYTES
        )
    except EgressError as error:
        duration = time.perf_counter() - started
        ours = isinstance(error, NoRoute | NoPlace)
        return SendResult(None, duration, f"{type(error).__name__}: {error}", ours=ours)
    problem = None if 200 <= answer.status < 300 else f"answered {answer.status}"
    return SendResult(
        answer.status, answer.duration, problem, answer.headers.get("retry-after"), answer.body
    )
