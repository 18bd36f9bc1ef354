"""What proves that the rest of a body is the rest of that body (RFC 9110, 8.8 and 14)."""

from typing import Any

import pytest

from service.images.fetch import Version

DAY, NOW = "Tue, 14 Nov 2023 22:13:20 GMT", "Fri, 15 Jan 2027 08:00:00 GMT"
WHOLE = Version('"a"', DAY, "", 1000)
PART = {"content-range": "bytes 400-999/1000", "etag": '"a"', "last-modified": DAY}


@pytest.mark.parametrize(
    ("headers", "known"),
    [
        ({"etag": '"a"', "last-modified": DAY, "date": NOW, "content-length": "1000"}, WHOLE),
        ({"etag": 'W/"a"', "content-length": "1000"}, Version(total=1000)),
        ({"etag": "a"}, Version()),
        ({"last-modified": DAY, "date": NOW}, Version(modified=DAY)),
        ({"last-modified": DAY, "date": DAY}, Version()),
        ({"content-encoding": " GZip "}, Version(encoding="gzip")),
        ({"content-length": "1e3"}, Version()),
        ({"content-length": "٣"}, Version()),
        ({}, Version()),
    ],
)
def test_a_version_is_what_can_be_proved(headers: dict[str, str], known: Version) -> None:
    """A weak tag, and a date within whose second the body may have changed again, prove nothing."""
    assert Version.whole(headers) == known


@pytest.mark.parametrize(
    ("version", "held", "headers"),
    [
        (WHOLE, 400, {"range": "bytes=400-", "if-range": '"a"'}),
        (Version(modified=DAY), 1, {"range": "bytes=1-", "if-range": DAY}),
        (Version(total=1000), 999, None),
        (WHOLE, 0, None),
        (Version(), 400, None),
    ],
)
def test_the_rest_is_asked_for_if_it_can_be_known(
    version: Version, held: int, headers: dict[str, str] | None
) -> None:
    """By the tag, else the date; two pictures may have one length, so without them, or with nothing
    in hand, the whole is asked for.
    """
    assert version.rest(held) == headers


@pytest.mark.parametrize(
    ("changed", "version"),
    [
        ({}, WHOLE),
        ({"content-range": "Bytes 400-400/*"}, WHOLE),
        ({"last-modified": NOW, "date": NOW}, WHOLE),
    ],
)
def test_a_part_that_fits_goes_on(changed: dict[str, Any], version: Version) -> None:
    """What it does not say, but for the tag, is not held against it."""
    assert WHOLE.continued(PART | changed, 400) == version


def test_a_part_may_tell_the_length() -> None:
    """A body that did not say how long it is may be said to be so by a part."""
    assert Version('"a"').continued(PART, 400) == Version('"a"', total=1000)


@pytest.mark.parametrize(
    "changed",
    [
        {"content-range": ""},
        {"content-range": "bytes 399-999/1000"},
        {"content-range": "bytes 401-999/1000"},
        {"content-range": "bytes 400-399/1000"},
        {"content-range": "bytes 400-999/1001"},
        {"content-range": "bytes */1000"},
        {"content-range": "bytes 400-999/1000, bytes 0-1/2"},
        {"content-range": "bytes ٤٠٠-999/1000"},
        {"etag": '"b"'},
        {"etag": ""},
        {"last-modified": NOW},
        {"content-encoding": "gzip"},
    ],
)
def test_a_part_that_does_not_fit_is_none(changed: dict[str, str]) -> None:
    """Another place, length, tag, date or coding: it is not put behind what is there."""
    assert WHOLE.continued(PART | changed, 400) is None
