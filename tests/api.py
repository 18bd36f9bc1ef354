"""Requests of an API client, and checks of the answers."""

import re
from collections.abc import Mapping
from typing import Any

import httpx

from tests.waiting import wait_until

JSON = dict[str, Any]

SUBMIT = "/v1/images/generations"
ASYNC = {"prefer": "respond-async"}
UNTIL_DONE = {"prefer": "wait=30"}
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


def an_id(prefix: str) -> str:
    return rf"{prefix}_[a-z2-7]{{26}}"


def order(**fields: Any) -> JSON:
    """The body of a small submission. A field with the value None is left out."""
    body = {"model": "wan2.5-text-to-image", "prompt": "a lighthouse", "size": "768x768", **fields}
    return {name: value for name, value in body.items() if value is not None}


async def submitted(
    client: httpx.AsyncClient, headers: Mapping[str, str] = ASYNC, **fields: Any
) -> JSON:
    """The task of an accepted submission."""
    return got(await client.post(SUBMIT, json=order(**fields), headers=headers))


def got(answer: httpx.Response, status: int = 200) -> JSON:
    """The document of a successful answer."""
    assert answer.status_code == status, answer.text
    assert re.fullmatch("[A-Za-z0-9._-]{1,64}", answer.headers["x-request-id"])
    document: JSON = answer.json()
    return document


def refused(
    answer: httpx.Response,
    status: int,
    code: str | None = None,
    *,
    param: str | None = None,
    task_id: str | None = None,
) -> JSON:
    """The error of an answer. Every error answer has the same form."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    document = answer.json()
    assert document.keys() == {"error"}
    error: JSON = document["error"]
    further = {"budget"} if error["code"] == "budget_exceeded" else set()
    assert error.keys() == {"code", "message", "type", "param", "request_id", "task_id", *further}
    assert error["request_id"] == answer.headers["x-request-id"]
    assert code is None or error["code"] == code, error
    assert isinstance(error["code"], str)
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    assert (error["param"], error["task_id"]) == (param, task_id)
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    return error


async def listed(client: httpx.AsyncClient, **query: Any) -> list[str]:
    """The ids in a list of tasks."""
    return [task["id"] for task in got(await client.get("/v1/tasks", params=query))["data"]]


async def reached(client: httpx.AsyncClient, replay: str, **figures: object) -> JSON:
    """The replay as soon as it shows these figures."""

    async def look() -> JSON | None:
        shown = got(await client.get(f"/v1/replays/{replay}"))
        return shown if figures.items() <= shown.items() else None

    shown: JSON = await wait_until(look)
    return shown
