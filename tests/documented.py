"""A client of the image API, written from the API's pages alone. It knows a service only by address
and key.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Self

import httpx

JSON = dict[str, Any]
Until = Callable[
    [Callable[[], Awaitable[Any]]], Awaitable[Any]
]  # polls, with pauses, until the answer is true

ENDED = ("completed", "failed", "cancelled", "canceled")
RETRIES = 2
CODES = {
    400: "invalid_request",
    401: "unauthorized",
    402: "insufficient_quota",
    403: "permission_denied",
    404: "task_not_found",
    429: "rate_limit_exceeded",
}


class Refusal(Exception):
    """An error answer of the API. `code` is always a word, although the older pages document the
    status as the code.
    """

    def __init__(self, status: int, body: JSON) -> None:
        error = body["error"]
        super().__init__(error["message"])
        self.status = status
        self.code = (
            error["code"]
            if isinstance(error["code"], str)
            else CODES.get(error["code"], "unknown_error")
        )
        self.type: str = error["type"]
        self.param: str | None = error.get("param")


@dataclass(frozen=True, slots=True)
class Images:
    urls: tuple[str, ...]
    credits: Decimal | None


@dataclass(frozen=True, slots=True)
class Failure:
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Cancelled:
    pass


def outcome(task: JSON) -> Images | Failure | Cancelled | None:
    """The outcome of a task in the body of a query or a callback. None if the task has
    not ended.
    """
    match task["status"]:
        case "completed":
            entries = task.get("results") or [
                entry["image_url"] for entry in task.get("result_data", ())
            ]
            used = task.get("usage", {}).get("credits_used")
            urls = tuple(entry if isinstance(entry, str) else entry["url"] for entry in entries)
            return Images(urls, None if used is None else Decimal(str(used)))
        case "failed":
            error = task["error"]
            return (
                Cancelled()
                if error["code"] == "request_cancelled"
                else Failure(error["code"], error["message"])
            )
        case "cancelled" | "canceled":
            return Cancelled()
    return None


class Client:
    """The client of one account, as an async context manager. Raises Refusal for every answer but
    200.
    """

    def __init__(self, base_url: str, key: str, until: Until) -> None:
        self._http = httpx.AsyncClient(
            base_url=base_url, headers={"authorization": f"Bearer {key}"}, timeout=30
        )
        self._until = until

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def submit(self, *, idempotency_key: str | None = None, **fields: Any) -> JSON:
        """The pending task. After a 429, which proves that nothing was created, the client submits
        again.
        """
        return (await self.submission(idempotency_key, **fields))[0]

    async def submission(self, idempotency_key: str | None, **fields: Any) -> tuple[JSON, bool]:
        """The pending task, and whether an earlier submission under the same key created it."""
        headers = {"idempotency-key": idempotency_key} if idempotency_key else {}
        answer = await self._http.post("/v1/images/generations", json=fields, headers=headers)
        for _ in range(RETRIES):
            if answer.status_code == 429:
                answer = await self._http.post(
                    "/v1/images/generations", json=fields, headers=headers
                )
        return read(answer), answer.headers.get("idempotency-replayed") == "true"

    async def task(self, id: str) -> JSON:
        return read(await self._http.get(f"/v1/tasks/{id}"))

    async def ended(self, id: str) -> JSON:
        """The task as soon as its status is terminal."""

        async def look() -> JSON | None:
            task = await self.task(id)
            return task if task["status"] in ENDED else None

        task: JSON = await self._until(look)
        return task

    async def credits(self) -> Decimal:
        body = read(await self._http.get("/v1/credits"))
        assert body["success"] is True
        return Decimal(str(body["data"]["token"]["remaining_credits"]))


def read(answer: httpx.Response) -> JSON:
    body: JSON = answer.json()
    if answer.status_code != 200:
        raise Refusal(answer.status_code, body)
    return body


async def saved(urls: tuple[str, ...]) -> list[bytes]:
    """The files behind result links, fetched without a key."""
    async with httpx.AsyncClient(timeout=30) as anybody:
        answers = [await anybody.get(url) for url in urls]
    return [answer.raise_for_status().content for answer in answers]


@dataclass(frozen=True, slots=True)
class Callbacks:
    """The callbacks of a `callback_url`, by task. The last callback counts, and duplicates are
    harmless.
    """

    bodies: dict[str, JSON]

    def take(self, headers: Mapping[str, str], body: JSON) -> None:
        assert headers["content-type"].startswith("application/json")
        self.bodies[body["id"]] = body
