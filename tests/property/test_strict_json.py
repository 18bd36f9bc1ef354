"""Strict JSON: an accepted body is read completely, and a refused one raises only ValueError."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.strict_json import MAX_DEPTH, read_object
from tests.callbacks import json_test_suite

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=20,
)


@given(st.dictionaries(TEXT, VALUES), st.booleans())
def test_any_plain_object_is_read_as_it_was_written(written: dict[str, Any], plain: bool) -> None:
    """The text may contain escapes or not."""
    assert read_object(json.dumps(written, ensure_ascii=plain).encode(), finite=True) == written


@given(st.binary())
@example(b'{"a":' * 100_000)
@example(b"[" * 1_000_000)
@example(b'{"a":' + b"9" * 5000 + b"}")
@example(b"\xff")
def test_any_body_is_an_object_or_a_value_error(body: bytes) -> None:
    """No bytes raise another exception."""
    try:
        assert isinstance(read_object(body), dict)
    except ValueError:
        return


@given(VALUES, st.sampled_from(["\0", "\ud800", "\udfff"]), TEXT)
def test_text_that_no_database_stores_is_refused_at_any_depth(
    value: Any, bad: str, text: str
) -> None:
    """It may be in a name or in a value."""
    for document in ({"a": [value, text + bad]}, {"a": {bad + text: value}}, {text + bad: value}):
        with pytest.raises(ValueError, match="NUL or a lone surrogate"):
            read_object(json.dumps(document).encode())


def test_the_depth_limit_does_not_depend_on_the_interpreter() -> None:
    for levels in (MAX_DEPTH - 1, MAX_DEPTH):
        body = b'{"a":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"
        assert read_object(body)
    with pytest.raises(ValueError, match="nested"):
        read_object(b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}")


def test_a_number_too_large_for_a_float_is_refused_with_finite() -> None:
    """A client's number is sent on as JSON, so it must be finite. An upstream's number is read all
    the same.
    """
    assert read_object(b'{"a": 1e400}') == {"a": float("inf")}
    for body in (b'{"a": 1e400}', b'{"a": [-1e400]}'):
        with pytest.raises(ValueError, match="too large"):
            read_object(body, finite=True)


# Valid JSON that is still refused: a field that occurs twice, or text that no database stores.
OURS = {
    "y_object_duplicated_key.json": "twice",
    "y_object_duplicated_key_and_value.json": "twice",
    "y_object_escaped_null_in_key.json": "NUL",
    "y_string_null_escape.json": "NUL",
}


def read(name: str, text: bytes) -> str:
    """What the reader does with a text of the suite."""
    try:
        found = read_object(b'{"a": ' + text + b"}")
    except ValueError as error:
        return str(error)
    assert found.keys() == {"a"}, name
    return "read"


@pytest.mark.parametrize("kind", ["y", "n", "i"])
def test_the_public_json_test_suite_is_read_as_it_expects(kind: str) -> None:
    """The reader accepts what the suite calls valid, with four exceptions of ours. It refuses what
    the suite calls invalid. No other case crashes.
    """
    suite = {name: text for name, text in json_test_suite().items() if name[0] == kind}
    assert len(suite) > 30
    said = {name: read(name, text) for name, text in suite.items()}
    accepted = {name for name, what in said.items() if what == "read"}
    if kind == "y":
        assert suite.keys() - accepted == OURS.keys()
        assert [name for name, word in OURS.items() if word not in said[name]] == []
    elif kind == "n":
        assert accepted == set()
