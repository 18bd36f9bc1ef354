"""Strict JSON: what is taken is taken whole, and nothing that is sent raises anything but
ValueError.
"""

import json
from contextlib import suppress
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
    """With escapes or without."""
    assert read_object(json.dumps(written, ensure_ascii=plain).encode(), finite=True) == written


@given(st.binary())
@example(b'{"a":' * 100_000)
@example(b"[" * 1_000_000)
@example(b'{"a":' + b"9" * 5000 + b"}")
@example(b"\xff")
def test_whatever_comes_is_an_object_or_a_value_error(body: bytes) -> None:
    """Never another exception: nobody's bytes are a defect of ours."""
    try:
        assert isinstance(read_object(body), dict)
    except ValueError:
        return


@given(VALUES, st.sampled_from(["\0", "\ud800", "\udfff"]), TEXT)
def test_text_that_nobody_takes_is_found_wherever_it_is(value: Any, bad: str, text: str) -> None:
    """In a name or a value, at any depth."""
    for document in ({"a": [value, text + bad]}, {"a": {bad + text: value}}, {text + bad: value}):
        with pytest.raises(ValueError, match="NUL or a lone surrogate"):
            read_object(json.dumps(document).encode())


def test_depth_has_a_limit_that_does_not_hang_on_the_interpreter() -> None:
    """So many levels and not one more."""
    for levels in (MAX_DEPTH - 1, MAX_DEPTH):
        body = b'{"a":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"
        assert read_object(body)
    with pytest.raises(ValueError, match="nested"):
        read_object(b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}")


def test_a_number_that_no_float_holds_is_refused_where_all_is_to_be_finite() -> None:
    """What is sent on must be JSON again; what an upstream says is read all the same."""
    assert read_object(b'{"a": 1e400}') == {"a": float("inf")}
    for body in (b'{"a": 1e400}', b'{"a": [-1e400]}'):
        with pytest.raises(ValueError, match="too large"):
            read_object(body, finite=True)


# JSON, and yet refused: a field that is there twice, or text that no database takes.
OURS = {
    "y_object_duplicated_key.json": "twice",
    "y_object_duplicated_key_and_value.json": "twice",
    "y_object_escaped_null_in_key.json": "NUL",
    "y_string_null_escape.json": "NUL",
}


@pytest.mark.parametrize(("name", "text"), json_test_suite().items())
def test_the_public_json_test_suite_is_read_as_it_says(name: str, text: bytes) -> None:
    """What it calls JSON is read, with four exceptions of our own; what it does not is refused; of
    the rest nothing crashes.
    """
    body = b'{"a": ' + text + b"}"
    if name[0] == "n" or name in OURS:
        with pytest.raises(ValueError, match=OURS.get(name)):
            read_object(body)
    elif name[0] == "y":
        assert read_object(body).keys() == {"a"}
    else:
        with suppress(ValueError):
            assert read_object(body).keys() == {"a"}
