"""The part of a document that is read when the whole is too large or too deep for the parser."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.upstreams import lenient
from service.upstreams.lenient import FIELDS, LEVELS, LONG, needed_part
from service.upstreams.reports import NAMES, PLACES

NEEDED = ["id", "status", "results", "url", "data", "0"]
KEYS = st.sampled_from([*NEEDED, "x", "meta", 'quo"te', "b\\", "ü", "[{"])
TEXTS = st.sampled_from(["x", 'quo"te', "back\\", "[{", "]}", "https://a/1", "", "é\n"])
VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


def expected(value: object, levels: int) -> object:
    if isinstance(value, dict | list) and not levels:
        return None
    if isinstance(value, dict):
        return {name: expected(each, levels - 1) for name, each in value.items() if name in NEEDED}
    return [expected(each, levels - 1) for each in value] if isinstance(value, list) else value


def without_marks(value: object) -> object:
    """A field with an empty name stands for fields that were left out."""
    if isinstance(value, dict):
        return {name: without_marks(each) for name, each in value.items() if name}
    return list(map(without_marks, value)) if isinstance(value, list) else value


@given(
    st.dictionaries(KEYS, VALUES, max_size=6),
    st.sampled_from([1, 2, 3, LEVELS]),
    st.sampled_from([None, 1]),
    st.sampled_from([b"", b'}]"rest{']),
)
def test_the_part_is_the_document_without_what_is_left_out(
    document: dict[str, object], levels: int, indent: int | None, rest: bytes
) -> None:
    """It is JSON, whatever is left out, and ends with the object."""
    body = json.dumps(document, indent=indent).encode() + rest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lenient, "LEVELS", levels)
        part = json.loads(needed_part(body))
    assert without_marks(part) == expected(document, levels)


def test_long_texts_are_left_out() -> None:
    body = b'{"error": {"code": "c", "message": "%b"}, "id": "x"}' % (b"x" * LONG)
    assert json.loads(needed_part(body)) == {"error": {"code": "c", "message": ""}, "id": "x"}


@pytest.mark.parametrize(
    "body", [b"", b"[", b'{"id": "', b'{"id": "\\', b'{"x": [1', b"[]" * (1 << 20)]
)
def test_what_is_no_whole_object_stays_as_it_is(body: bytes) -> None:
    """The time for brackets and quotes without end is bounded."""
    assert needed_part(body) in (body, b"[]")


def test_every_name_that_is_read_is_kept() -> None:
    assert {name.encode() for name in (*NAMES, *PLACES)} <= FIELDS
