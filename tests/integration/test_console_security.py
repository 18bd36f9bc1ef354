"""The console over plain HTTP: sessions, forms and headers."""

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from service.web.auth import CACHE_S
from service.web.console.sign_in import ATTEMPTS
from service.web.sessions import COOKIE, SESSION_S
from tests.api import UNTIL_DONE, got, submitted
from tests.inputs import photo, uploaded
from tests.waiting import wait_until
from tests.world import ADMIN_KEY, World, world

PLAYGROUND, SIGN_IN = "/console/playground", "/console/sign-in"
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{7*7}}"


@pytest.fixture(scope="module")
async def here(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with world(tmp_path_factory.mktemp("console")) as made:
        yield made


class InlineFinder(HTMLParser):
    """Finds scripts without an address, style elements, and attributes that run or style."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {name for name, _ in attrs}
        if tag == "style" or (tag == "script" and "src" not in names):
            self.found.append(tag)
        self.found += [name for name in names if name == "style" or name.startswith("on")]


def csrf_of(page: httpx.Response) -> str:
    found = re.search(r'name="csrf" (?:value|content)="([^"]+)"', page.text)
    assert found
    return found[1]


async def sign_in(browser: httpx.AsyncClient, key: str, **headers: str) -> httpx.Response:
    form = await browser.get(SIGN_IN)
    fields = {"csrf": csrf_of(form), "next": PLAYGROUND, "key": key}
    return await browser.post(SIGN_IN, data=fields, headers=headers)


@asynccontextmanager
async def signed_in(here: World, key: str = ADMIN_KEY) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=here.url, timeout=30) as browser:
        answer = await sign_in(browser, key)
        assert (answer.status_code, answer.headers["location"]) == (303, PLAYGROUND)
        yield browser


@pytest.fixture
def later(here: World) -> Iterator[Any]:
    """Sets the clock of sessions forward, in seconds."""
    sessions = here.context.access.sessions
    assert sessions is not None
    clock = sessions.clock

    def ahead(seconds: float) -> None:
        object.__setattr__(sessions, "clock", lambda: clock() + round(seconds * 1000))

    yield ahead
    object.__setattr__(sessions, "clock", clock)


async def test_the_cookie_is_sealed_and_out_of_reach_of_scripts_and_other_sites(
    here: World,
) -> None:
    async with httpx.AsyncClient(base_url=here.url) as browser:
        answer = await sign_in(browser, ADMIN_KEY)
        name, _, value = answer.headers["set-cookie"].partition(";")[0].partition("=")
        attributes = {each.strip() for each in answer.headers["set-cookie"].split(";")[1:]}
        assert name == COOKIE
        assert {"HttpOnly", "SameSite=Strict", "Path=/", f"Max-Age={SESSION_S}"} == attributes
        assert ADMIN_KEY not in value
        assert (await browser.get(PLAYGROUND)).status_code == 200
        for place in (10, len(value) // 2, len(value) - 3):
            forged = value[:place] + ("A" if value[place] != "A" else "B") + value[place + 1 :]
            cookie = {"cookie": f"{COOKIE}={forged}"}
            assert (await here.stranger.get(PLAYGROUND, headers=cookie)).status_code == 303


async def test_the_cookie_is_secure_where_the_public_address_is_https(here: World) -> None:
    sessions = here.context.access.sessions
    assert sessions is not None
    object.__setattr__(sessions, "base_url", "https://darkroom.example.com")
    try:
        async with httpx.AsyncClient(base_url=here.url) as browser:
            assert "; Secure" in (await browser.get(SIGN_IN)).headers["set-cookie"]
    finally:
        object.__setattr__(sessions, "base_url", here.url)


@pytest.mark.parametrize("key", ["", "dk_wrong", "x" * 5000, "\x00", "ключ", HOSTILE])
async def test_a_wrong_key_does_not_sign_in(here: World, key: str) -> None:
    async with httpx.AsyncClient(base_url=here.url) as browser:
        answer = await sign_in(browser, key)
        assert answer.status_code in (400, 401)
        assert HOSTILE not in answer.text
        assert (await browser.get(PLAYGROUND)).status_code == 303


async def test_a_session_ends_after_twelve_hours(here: World, later: Any) -> None:
    """It does not slide: requests do not renew it. Its event stream ends too."""
    async with signed_in(here) as browser:
        later(SESSION_S - 60)
        assert (await browser.get(PLAYGROUND)).status_code == 200
        later(SESSION_S + 2)
        assert (await browser.get(PLAYGROUND)).status_code == 303
        assert (await browser.get("/v1/events")).status_code == 401


async def test_a_session_ends_with_its_key(here: World) -> None:
    body = {"owner": "leaver", "scopes": ["submit", "read"]}
    key = got(await here.client.post("/v1/keys", json=body), 201)
    async with signed_in(here, key["key"]) as browser:
        assert (await here.client.delete(f"/v1/keys/{key['id']}")).status_code == 204

        async def ended() -> bool:
            return (await browser.get(PLAYGROUND)).status_code == 303

        await wait_until(ended, CACHE_S + 20)
        assert (await browser.get("/v1/events")).status_code == 401


async def test_sign_out_takes_the_cookie_away(here: World) -> None:
    async with signed_in(here) as browser:
        token = csrf_of(await browser.get(PLAYGROUND))
        answer = await browser.post("/console/sign-out", data={"csrf": token})
        assert answer.status_code == 303
        assert (await browser.get(PLAYGROUND)).status_code == 303


@pytest.mark.parametrize("token", [None, "", "wrong", "é"])
@pytest.mark.parametrize("path", [PLAYGROUND, f"{PLAYGROUND}/again", "/console/sign-out"])
async def test_a_form_without_the_sessions_token_does_nothing(
    here: World, token: str | None, path: str
) -> None:
    fields = {"model": "wan2.5-text-to-image", "prompt": "forged", "act": "send"}
    async with signed_in(here) as browser:
        answer = await browser.post(
            path, data=fields if token is None else {**fields, "csrf": token}
        )
        assert answer.status_code == 403
        assert (await browser.get(PLAYGROUND)).status_code == 200
    tasks = got(await here.client.get("/v1/tasks"))["data"]
    assert "forged" not in [task["prompt"] for task in tasks]


async def test_a_token_of_another_session_does_nothing(here: World) -> None:
    async with signed_in(here) as browser, signed_in(here) as other:
        token = csrf_of(await other.get(PLAYGROUND))
        assert (await browser.post("/console/sign-out", data={"csrf": token})).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example.com"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": "http://127.0.0.1:1"},
    ],
    ids=str,
)
async def test_a_form_of_another_site_does_nothing(here: World, headers: dict[str, str]) -> None:
    """Also with the right token, and also at the sign-in."""
    async with signed_in(here) as browser:
        token = csrf_of(await browser.get(PLAYGROUND))
        fields = {"csrf": token, "act": "check"}
        assert (await browser.post(PLAYGROUND, data=fields, headers=headers)).status_code == 403
        own = {"origin": here.url, "sec-fetch-site": "same-origin"}
        assert (await browser.post(PLAYGROUND, data=fields, headers=own)).status_code == 200
    async with httpx.AsyncClient(base_url=here.url) as visitor:
        assert (await sign_in(visitor, ADMIN_KEY, **headers)).status_code == 403


@pytest.mark.parametrize(
    "path",
    [
        SIGN_IN,
        PLAYGROUND,
        "/console/nothing",
        "/console/",
        "/docs",
        "/docs/",
        "/docs/schemas",
        "/docs/events",
    ],
)
async def test_every_page_has_the_headers_that_protect_it(here: World, path: str) -> None:
    """No inline script or style, no frame, no other address, nothing kept by a cache."""
    async with signed_in(here) as browser:
        page = await browser.get(path)
    policy = dict(
        part.strip().partition(" ")[::2]
        for part in page.headers["content-security-policy"].split(";")
    )
    assert "unsafe" not in page.headers["content-security-policy"]
    assert (policy["default-src"], policy["frame-ancestors"], policy["base-uri"]) == ("'none'",) * 3
    assert {policy[name] for name in ("script-src", "style-src", "connect-src", "img-src")} == {
        "'self'"
    }
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["x-frame-options"] == "DENY"
    assert path.startswith("/docs") or page.headers["cache-control"] == "no-store"
    inline = InlineFinder()
    inline.feed(page.text)
    assert inline.found == []
    addresses = re.findall(r'(?:src|href|action)="(?!/|#)([^"]*)"', page.text)
    assert addresses == []


async def test_the_documentation_is_small_and_its_links_lead_somewhere(here: World) -> None:
    """Each page has at most 100 KB."""
    paths = ("/docs", "/docs/schemas", "/docs/events")
    pages = {path: (await here.stranger.get(path)).text for path in paths}
    for path, page in pages.items():
        assert len(page.encode()) <= 100_000
        for target in set(re.findall('href="([^"]*#[^"]+)"', page)):
            other, _, id = target.partition("#")
            assert f'id="{id}"' in pages[other or path], target


async def test_failed_sign_ins_are_limited(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Then even the right key waits, and the answer says for how long."""
    async with (
        world(tmp_path_factory.mktemp("limit")) as there,
        httpx.AsyncClient(base_url=there.url) as browser,
    ):
        for _ in range(ATTEMPTS):
            assert (await sign_in(browser, "dk_wrong")).status_code == 401
        answer = await sign_in(browser, ADMIN_KEY)
        assert answer.status_code == 429
        assert 0 < int(answer.headers["retry-after"]) <= 61
        assert (await there.client.get("/v1/tasks")).status_code == 200


async def test_the_console_can_be_switched_off(tmp_path_factory: pytest.TempPathFactory) -> None:
    async with world(tmp_path_factory.mktemp("off"), console="off") as there:
        for path in ("/console/", SIGN_IN, PLAYGROUND):
            assert (await there.stranger.get(path)).status_code == 404
        docs = await there.stranger.get("/docs")
        assert (docs.status_code, "/console/" in docs.text) == (200, False)


@pytest.mark.parametrize(
    ("target", "goes"),
    [
        (f"{PLAYGROUND}?model=z-image-turbo", f"{PLAYGROUND}?model=z-image-turbo"),
        ("https://evil.example.com/", "/console/"),
        ("//evil.example.com", "/console/"),
        ("/console//evil.example.com/..\\", "/console/"),
        ("javascript:alert(1)", "/console/"),
        ("/v1/tasks", "/console/"),
        ("/console\n/x", "/console/"),
    ],
)
async def test_the_sign_in_leads_to_pages_of_the_console_only(
    here: World, target: str, goes: str
) -> None:
    async with httpx.AsyncClient(base_url=here.url) as browser:
        form = await browser.get(f"{SIGN_IN}?next={quote(target)}")
        fields = {"csrf": csrf_of(form), "next": target, "key": ADMIN_KEY}
        assert (await browser.post(SIGN_IN, data=fields)).headers["location"] == goes


async def test_hostile_texts_are_escaped_wherever_they_appear(here: World) -> None:
    """Prompts, metadata, models in the query, errors of the upstream, and fields of the form."""
    task = await here.submit(prompt=HOSTILE, metadata={"k": HOSTILE})
    refused = await here.submit(
        prompt=HOSTILE, negative_prompt=HOSTILE, sandbox={"fail": "content_policy_violation"}
    )
    async with signed_in(here) as browser:
        token = csrf_of(await browser.get(PLAYGROUND))
        every = dict.fromkeys(
            ("prompt", "negative_prompt", "size", "width", "height", "n", "image", "image_link"),
            HOSTILE,
        )
        for page in (
            await browser.get(PLAYGROUND, params={"task": task["id"]}),
            await browser.get(PLAYGROUND, params={"task": refused["id"]}),
            await browser.get(PLAYGROUND, params={"model": HOSTILE, "reference": HOSTILE}),
            await browser.get(f"/console/{quote(HOSTILE)}"),
            await browser.post(PLAYGROUND, data={"csrf": token, **every, "model": HOSTILE}),
            await browser.post(
                PLAYGROUND, data={"csrf": token, **every, "model": "wan2.5-image-to-image"}
            ),
            await browser.post(PLAYGROUND, data={"csrf": token, **every, "act": "send"}),
        ):
            assert page.status_code < 500
            assert "<script>alert" not in page.text
            assert "<img src=x" not in page.text
            assert 'onerror=alert(1)>"' not in page.text
            assert "49" not in re.findall(r"\{\{7\*7\}\}|>49<", page.text)


async def test_owners_see_only_their_own(here: World) -> None:
    """The task of another owner is not found, and no list has it."""
    async with here.owner("submit", "read") as client:
        key = client.headers["authorization"].removeprefix("Bearer ")
        foreign = await here.submit(prompt="not for everybody")
        async with signed_in(here, key) as browser:
            page = await browser.get(PLAYGROUND)
            assert "not for everybody" not in page.text
            assert (
                await browser.get(PLAYGROUND, params={"task": foreign["id"]})
            ).status_code == 404
            fields = {"csrf": csrf_of(page), "task": foreign["id"], "idempotency_key": "k"}
            assert (await browser.post(f"{PLAYGROUND}/again", data=fields)).status_code == 404


async def test_a_key_without_the_scope_gets_no_page(here: World) -> None:
    async with here.owner("subscribe") as client:
        key = client.headers["authorization"].removeprefix("Bearer ")
        async with httpx.AsyncClient(base_url=here.url) as browser:
            await sign_in(browser, key)
            assert (await browser.get(PLAYGROUND)).status_code == 403


async def test_a_key_that_only_submits_sends_tasks(here: World) -> None:
    """It sees no task, so that the playground says what became of the form."""
    async with here.owner("submit") as client:
        key = client.headers["authorization"].removeprefix("Bearer ")
        async with signed_in(here, key) as browser:
            page = await browser.get(PLAYGROUND)
            assert (page.status_code, "Not shown" in page.text) == (200, True)
            fields = {"csrf": csrf_of(page), "act": "send", "prompt": "unseen"}
            fields |= {"model": "wan2.5-text-to-image", "idempotency_key": "k"}
            answer = await browser.post(PLAYGROUND, data=fields)
            assert (answer.status_code, answer.headers["location"]) == (303, PLAYGROUND)
            assert "was sent" in (await browser.get(PLAYGROUND)).text


async def test_only_events_and_the_content_of_files_accept_the_cookie(here: World) -> None:
    file = f"/v1/files/{(await uploaded(here.client))['id']}"
    async with signed_in(here) as browser:
        assert (await browser.get(f"{file}/content")).content == photo()
        for path in (file, "/v1/tasks", "/v1/keys", "/v1/credits", "/metrics"):
            assert (await browser.get(path)).status_code == 401
        assert (await browser.delete(f"{file}/content")).status_code == 405
        accept = {"accept": "text/event-stream"}
        async with browser.stream("GET", "/v1/events", headers=accept) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")


async def test_assets_are_cached_for_a_year_under_their_hash(here: World) -> None:
    page = await here.stranger.get(SIGN_IN)
    found = re.search(r'href="(/assets/[0-9a-f]{16}/console\.css)"', page.text)
    assert found
    asset = await here.stranger.get(found[1])
    assert asset.headers["cache-control"] == "public, max-age=31536000, immutable"
    again = await here.stranger.get(found[1], headers={"if-none-match": asset.headers["etag"]})
    assert again.status_code == 304
    old = await here.stranger.get("/assets/0000000000000000/console.css")
    assert (old.content, old.headers["cache-control"]) == (asset.content, "no-cache")
    assert (await here.stranger.get("/assets/0/..%2Fsettings.py")).status_code == 404


async def test_a_link_from_another_site_keeps_the_session(here: World) -> None:
    """The browser sends no strict cookie with it. The page loads itself once more, without a new
    cookie that would replace the session.
    """
    headers = {"sec-fetch-site": "cross-site"}
    async with httpx.AsyncClient(base_url=here.url) as browser:
        page = await browser.get(PLAYGROUND, headers=headers)
    assert f'content="0;url={PLAYGROUND}"' in page.text
    assert "set-cookie" not in page.headers


async def test_every_model_of_the_catalogue_has_its_form(here: World) -> None:
    async with signed_in(here) as browser:
        for model in here.context.intake.catalogue.models:
            page = await browser.get(PLAYGROUND, params={"model": model})
            assert (model, page.status_code, page.text.count('id="order"')) == (model, 200, 1)
            assert len(page.content) < 100_000


async def test_a_link_is_signed_for_the_owner_of_its_image_alone(tmp_path: Path) -> None:
    """The playground's form may name any image."""
    async with world(tmp_path, image_link_ttl_s=60) as here, here.owner() as one:
        (image,) = (await submitted(one, UNTIL_DONE))["images"]
        async with here.owner() as other:
            for client, signed in ((one, True), (other, False)):
                key = client.headers["authorization"].removeprefix("Bearer ")
                async with signed_in(here, key) as browser:
                    page = await browser.get(PLAYGROUND, params={"reference": image["id"]})
                    assert image["id"] in page.text
                    assert (f"/images/{image['id']}?expires=" in page.text) == signed
