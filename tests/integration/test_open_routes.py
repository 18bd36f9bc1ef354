"""Routes that need no key. Anybody may flood them, so none costs the event loop much."""

import asyncio
import json
import threading

import pytest
from starlette.requests import Request

from service.web import asyncapi, openapi
from service.web.context import Context
from service.web.published import Published
from service.web.routes import health_routes, table
from tests.api import got
from tests.world import World

DOCUMENTS = pytest.mark.parametrize("path", ["/openapi.json", "/asyncapi.json"])


@DOCUMENTS
async def test_a_document_is_built_once_per_process(
    here: World, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first request builds it. Every later request gets the same bytes, and builds nothing."""
    await here.stranger.get(path)
    for module in (openapi, asyncapi):
        monkeypatch.setattr(module, "models_json_schema", None)  # building would fail
    answers = await asyncio.gather(*(here.stranger.get(path) for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1


async def test_the_first_requests_at_once_have_the_document_built_once() -> None:
    """A flood of first requests costs no more than one of them."""
    built, release = list[threading.Thread](), threading.Event()

    def build() -> dict[str, str]:
        built.append(threading.current_thread())
        release.wait(30)
        return {"a": "b"}

    document, request = Published(build), Request({"type": "http", "headers": []})
    asking = [asyncio.create_task(document.answer(request)) for _ in range(20)]
    await asyncio.sleep(0)  # each of them has begun
    release.set()
    assert {bytes(answer.body) for answer in await asyncio.gather(*asking)} == {b'{"a":"b"}'}
    assert len(built) == 1


@DOCUMENTS
@pytest.mark.parametrize("form", ["{}", "W/{}", '"other", {}', '{} , W/"x"', "*"])
async def test_a_reader_that_has_the_document_gets_no_body(
    here: World, path: str, form: str
) -> None:
    """`If-None-Match` with the document's entity tag is answered with 304 and the tag."""
    whole = await here.stranger.get(path)
    etag = whole.headers["etag"]
    answer = await here.stranger.get(path, headers={"if-none-match": form.format(etag)})
    assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
    other = await here.stranger.get(path, headers={"if-none-match": '"other"'})
    assert (other.status_code, other.content) == (200, whole.content)


async def test_the_commands_print_the_served_documents(here: World) -> None:
    served = (await here.stranger.get("/openapi.json")).content
    assert json.loads(served) == openapi.document(table.SPECS)
    served = (await here.stranger.get("/asyncapi.json")).content
    assert json.loads(served) == asyncapi.document()


async def test_requests_without_a_key_share_the_look_at_the_store(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred probes at once write to the store once or twice. A request with a key looks for
    itself.
    """
    looks = 0
    look = health_routes._readiness

    async def counted(context: Context) -> tuple[str, list[str]]:
        nonlocal looks
        looks += 1
        return await look(context)

    monkeypatch.setattr(health_routes, "_readiness", counted)
    await asyncio.gather(*(here.stranger.get("/readyz") for _ in range(100)))
    assert 1 <= looks <= 10
    looks = 0
    for _ in range(3):
        assert got(await here.client.get("/readyz")) == {"status": "ok", "causes": []}
    assert looks == 3
