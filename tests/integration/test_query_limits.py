"""The number of filters in a query is limited. Otherwise a statement grows beyond what the store
takes, and an operator is told that the store failed.
"""

import pytest
from structlog.testing import capture_logs

from tests.api import got, refused
from tests.world import World


def metadata(count: int) -> str:
    return "&".join(f"metadata.{number}=" for number in range(count))


@pytest.mark.parametrize(
    ("path", "param", "limit"),
    [
        (f"/v1/tasks?{metadata(17)}", "metadata", "16"),
        (f"/v1/tasks?{metadata(4000)}", "metadata", "16"),
        (f"/v1/tasks?{metadata(17)}&state=queued&model=m", "metadata", "16"),
        ("/v1/events?type=" + ",".join(["image.task.completed"] * 33), "type", "32"),
        ("/v1/events?" + "&".join(["type=*"] * 33), "type", "32"),
        ("/v1/events?type=" + ",".join(["*"] * 20_000), "type", "32"),
        ("/v1/events?type=" + ",".join(f"x{number}" for number in range(9000)), "type", "32"),
    ],
    ids=lambda value: value[:40],
)
async def test_too_many_filters_are_refused_with_the_limit(
    still: World, path: str, param: str, limit: str
) -> None:
    """The answer is 400, and no line says that the store failed."""
    with capture_logs() as lines:
        error = refused(await still.client.get(path), 400, "invalid_request", param=param)
    assert limit in error["message"]
    assert not [line for line in lines if line["event"] == "store.failed"]


async def test_too_many_types_of_a_stream_are_refused_too(still: World) -> None:
    headers = {"accept": "text/event-stream"}
    answer = await still.client.get("/v1/events?" + "&".join(["type=*"] * 33), headers=headers)
    refused(answer, 400, "invalid_request", param="type")


async def test_as_many_filters_as_the_limit_are_allowed(still: World) -> None:
    got(await still.client.get(f"/v1/tasks?{metadata(16)}"))
    got(await still.client.get("/v1/events?type=" + ",".join(["*"] * 32)))


@pytest.mark.parametrize("text", ["%ED%A0%80", "%FF", "a%C3"])
async def test_a_query_that_is_no_utf_8_is_refused(still: World, text: str) -> None:
    for path in (f"/v1/tasks?model={text}", f"/v1/tasks?metadata.{text}=1"):
        refused(await still.client.get(path), 400, "invalid_request")
