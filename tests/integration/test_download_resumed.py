"""A download that breaks in the middle goes on from what it has, and never puts two different
bodies together.
"""

import gzip
import re
from collections.abc import AsyncIterator, Callable, Mapping
from email.utils import formatdate
from itertools import pairwise
from typing import Any

import pytest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.images.fetch import REQUESTS
from tests.downloads import (
    NOTHING,
    Part,
    bytes_of,
    downloading,
    link,
    lost,
    made,
    noise,
    saved,
    steps,
)
from tests.upstream import Upstream, error, picture
from tests.waiting import wait_until
from tests.world import World

BODY, OTHER = (
    noise(size=(700, 500)),
    noise(size=(700, 501)),
)  # about a megabyte: more than sockets and parsers hold back
CUT = 800_000
TAG = {"etag": '"one"'}
OLD = formatdate(1_700_000_000, usegmt=True)
Headers = list[dict[str, str]]


@pytest.fixture(scope="module")
def upstream() -> Upstream:
    return Upstream()


@pytest.fixture(scope="module")
async def here(
    upstream: Upstream, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    limits: dict[str, Any] = {"max_image_bytes": 3_000_000, "max_image_pixels": 1_000_000}
    async with downloading(tmp_path_factory.mktemp("resumed"), upstream, **limits) as made:
        yield made


class Ranged(Response):
    """A file whose server honours `Range`; `says` is its Content-Range, `most` how many bytes of it
    are sent.
    """

    def __init__(
        self,
        body: bytes,
        *,
        cut: int | None = None,
        seen: Headers,
        says: str = "bytes {0}-{1}/{2}",
        most: int | None = None,
        headers: Mapping[str, str] = NOTHING,
    ) -> None:
        super().__init__()
        self._file, self._cut, self._seen, self._says, self._most, self._sent = (
            body,
            cut,
            seen,
            says,
            most,
            headers,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", dict(scope["headers"]).get(b"range", b"").decode())
        start = int(asked[1]) if asked else 0
        part = self._file[start : start + (self._most or len(self._file))]
        said = (
            {"content-range": self._says.format(start, start + len(part) - 1, len(self._file))}
            if asked
            else {}
        )
        answer = Part(
            part,
            206 if asked else 200,
            cut=self._cut,
            seen=self._seen,
            headers={**said, **self._sent},
        )
        await answer(scope, receive, send)


async def test_it_goes_on_where_it_broke(here: World, upstream: Upstream) -> None:
    """Within the same try, asking for the rest of the very same body; what is kept is the whole."""
    seen: Headers = []
    answers = [Ranged(BODY, cut=cut, seen=seen, headers=TAG) for cut in (CUT, 150_000, None)]
    image = await saved(here, upstream, "broken", *answers)
    assert await bytes_of(here, image) == BODY
    assert [request.get("if-range") for request in seen] == [None, '"one"', '"one"']
    starts = [
        int(request["range"].removeprefix("bytes=").removesuffix("-")) for request in seen[1:]
    ]
    assert 0 < starts[0] <= CUT
    assert starts[0] <= starts[1] <= starts[0] + 150_000
    assert all(request["accept-encoding"] == "identity" for request in seen)


async def test_a_part_of_what_was_asked_is_gone_on_with(here: World, upstream: Upstream) -> None:
    """A server may send less of a range than it was asked for."""
    seen: Headers = []
    answers = [
        Ranged(BODY, cut=CUT, seen=seen, headers=TAG),
        Ranged(BODY, seen=seen, most=100_000, headers=TAG),
        Ranged(BODY, seen=seen, headers=TAG),
    ]
    assert await bytes_of(here, await saved(here, upstream, "in parts", *answers)) == BODY
    assert len(seen) == 3


ANEW: dict[str, Callable[[Headers], list[Response]]] = {
    "a server without ranges": lambda seen: [Part(BODY, seen=seen, headers=TAG)],
    "another body as a whole": lambda seen: [Part(OTHER, seen=seen, headers={"etag": '"two"'})],
    "no such range": lambda seen: [Part(b"", 416, seen=seen), Part(BODY, seen=seen)],
    "another place": lambda seen: [
        Ranged(BODY, says="bytes 7-{1}/{2}", seen=seen),
        Part(BODY, seen=seen),
    ],
    "an impossible place": lambda seen: [
        Ranged(BODY, says="bytes {0}-6/{2}", seen=seen),
        Part(BODY, seen=seen),
    ],
    "no place": lambda seen: [Part(BODY, 206, seen=seen), Part(BODY, seen=seen)],
    "another unit": lambda seen: [
        Ranged(BODY, says="pixels {0}-{1}/{2}", seen=seen),
        Part(BODY, seen=seen),
    ],
    "another length": lambda seen: [
        Ranged(BODY, says="bytes {0}-{1}/9999999", seen=seen),
        Part(BODY, seen=seen),
    ],
    "another tag": lambda seen: [
        Ranged(OTHER, headers={"etag": '"two"'}, seen=seen),
        Part(OTHER, seen=seen),
    ],
    "another coding": lambda seen: [
        Ranged(BODY, seen=seen, headers={**TAG, "content-encoding": "br"}),
        Part(BODY, seen=seen),
    ],
    "more than it says": lambda seen: [
        Ranged(BODY + BODY, says="bytes {0}-{1}/*", seen=seen, headers=TAG),
        Part(BODY, seen=seen),
    ],
}


@pytest.mark.parametrize("name", ANEW)
async def test_what_does_not_fit_begins_anew(name: str, here: World, upstream: Upstream) -> None:
    """Anything but the rest of that body is not put behind it; the whole is fetched in the same
    try.
    """
    seen: Headers = []
    answers = ANEW[name](seen)
    task = await made_with(
        here, upstream, name, Ranged(BODY, cut=CUT, seen=seen, headers=TAG), *answers
    )
    assert await bytes_of(here, task["images"][0]) == answers[-1].body
    assert [step for step, _ in await steps(here, task)] == ["image.stored"]
    assert ["range" in request for request in seen] == [False, True, *(False for _ in answers[1:])]


async def made_with(
    here: World, upstream: Upstream, name: str, *answers: Response
) -> dict[str, Any]:
    upstream.files[name] = list(answers)
    return await here.ended((await made(here, upstream, link(here, name)))["id"])


@pytest.mark.parametrize(
    ("headers", "condition"),
    [
        ({"etag": '"one"', "last-modified": OLD}, '"one"'),
        ({"etag": 'W/"one"', "last-modified": OLD}, OLD),
        ({"last-modified": OLD}, OLD),
    ],
)
async def test_the_rest_is_asked_for_by_what_proves_it(
    headers: dict[str, str], condition: str, here: World, upstream: Upstream
) -> None:
    """By a strong tag, else a date that proves it."""
    seen: Headers = []
    answers = [Ranged(BODY, cut=cut, seen=seen, headers=headers) for cut in (CUT, None)]
    assert (
        await bytes_of(here, await saved(here, upstream, f"proof-{len(upstream.files)}", *answers))
        == BODY
    )
    assert seen[1]["range"]
    assert seen[1]["if-range"] == condition


@pytest.mark.parametrize("headers", [{}, {"etag": 'W/"one"'}], ids=["nothing", "a weak tag"])
async def test_without_proof_nothing_is_put_together(
    headers: dict[str, str], here: World, upstream: Upstream
) -> None:
    """Another picture may have the same length: the next try fetches the whole."""
    seen: Headers = []
    answers = [
        Part(BODY, cut=CUT, seen=seen, headers=headers),
        Part(BODY, seen=seen, headers=headers),
    ]
    task = await made_with(here, upstream, f"unproved-{len(headers)}", *answers)
    assert await bytes_of(here, task["images"][0]) == BODY
    assert [step for step, _ in await steps(here, task)] == ["image.retry", "image.stored"]
    assert not any("range" in request for request in seen)


@pytest.mark.parametrize(
    "second",
    [Part(BODY, cut=0, headers=TAG), error(503, "service_unavailable")],
    ids=["nothing", "an error"],
)
async def test_no_progress_ends_the_try(second: Response, here: World, upstream: Upstream) -> None:
    """A server in trouble is left alone until the next try, which fetches the whole."""
    name = f"no progress {second.status_code}"
    task = await made_with(
        here, upstream, name, Part(BODY, cut=CUT, headers=TAG), second, Part(BODY, headers=TAG)
    )
    assert await bytes_of(here, task["images"][0]) == BODY
    assert [step for step, _ in await steps(here, task)] == ["image.retry", "image.stored"]
    assert upstream.asked[name] == 3


async def test_a_body_that_always_breaks_ends_the_try(here: World, upstream: Upstream) -> None:
    """So many requests and no more; then the schedule counts."""
    seen: Headers = []
    upstream.files["ever"] = [
        Ranged(BODY, cut=CUT, seen=seen, headers=TAG),
        *(Ranged(BODY, cut=1000, seen=seen, headers=TAG) for _ in range(3)),
    ]
    upstream.files["ever"] += [Part(BODY, cut=CUT, seen=seen, headers=TAG)] * 20
    task = await made(here, upstream, link(here, "ever"))
    await wait_until(lambda: len(seen) > 2 * REQUESTS)
    await here.client.post(f"/v1/tasks/{task['id']}/cancel")
    anew = [number for number, request in enumerate(seen) if "range" not in request]
    assert anew[0] == 0
    assert max(later - before for before, later in pairwise(anew)) <= REQUESTS


async def test_a_server_that_gives_a_little_each_time_ends_the_try(
    here: World, upstream: Upstream
) -> None:
    """Progress alone does not hold a place for long."""
    little = [Ranged(BODY, seen=[], most=10, headers=TAG)] * (REQUESTS - 1)
    task = await made_with(
        here, upstream, "little", Ranged(BODY, cut=CUT, seen=[], headers=TAG), *little, Part(BODY)
    )
    assert await bytes_of(here, task["images"][0]) == BODY
    assert await steps(here, task) == [
        ("image.retry", f"not whole after {REQUESTS} requests"),
        ("image.stored", None),
    ]


async def test_the_limit_counts_all_parts(here: World, upstream: Upstream) -> None:
    """Bytes are counted over the requests of a try, whatever each of them says of its length."""
    endless = BODY + bytes(3_000_000)
    upstream.files["endless"] = [
        Ranged(endless, cut=CUT, seen=[], headers=TAG),
        Ranged(endless, says="bytes {0}-{1}/*", seen=[], headers=TAG),
    ]
    assert await lost(here, upstream, link(here, "endless")) == "over 3000000 bytes"
    assert upstream.asked["endless"] == 2


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "GZIP"])
async def test_what_comes_packed_is_unpacked(coding: str, here: World, upstream: Upstream) -> None:
    """Some servers pack what was asked for as it is: lengths and ranges are the packed body's, what
    is kept is the picture.
    """
    packed = gzip.compress(BODY, mtime=0)
    answers = [
        Ranged(packed, cut=cut, seen=[], headers={**TAG, "content-encoding": coding})
        for cut in (CUT, None)
    ]
    image = await saved(here, upstream, coding, *answers)
    assert await bytes_of(here, image) == BODY
    assert image["bytes"] == len(BODY)


async def test_a_coding_that_is_a_lie_changes_nothing(here: World, upstream: Upstream) -> None:
    """A picture is one by its content."""
    image = await saved(
        here, upstream, "lie", Part(picture(), headers={"content-encoding": "gzip"})
    )
    assert await bytes_of(here, image) == picture()
