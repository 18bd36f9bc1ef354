"""Rules of signing that hold for any input."""

import json
from datetime import UTC, datetime

import standardwebhooks
from hypothesis import given
from hypothesis import strategies as st

from service.signing import Keyring, canonical_json, new_secret, sign_webhook

KEYRING = Keyring([b"k" * 32, b"l" * 32])
ANY = st.text(st.characters(codec=None))  # with NUL and lone surrogates
IDS = st.from_regex("[A-Za-z0-9_-]{1,40}", fullmatch=True)
SECRETS = st.binary(min_size=24, max_size=64).map(new_secret)
TIMES = st.integers(0, 10**12 - 1)
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | ANY,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY, inner, max_size=4),
    max_leaves=20,
)


@given(ANY, ANY, ANY)
def test_no_text_makes_a_token_check_raise(upstream: str, task_id: str, token: str) -> None:
    """The caller chooses every part of the path. Only the right token is valid."""
    right = KEYRING.callback_token(upstream, task_id)
    assert KEYRING.callback_token_valid(upstream, task_id, token) is (token == right)
    assert KEYRING.callback_token_valid(upstream, task_id, right)


@given(ANY, ANY, ANY, ANY)
def test_different_parts_have_different_tokens(one: str, two: str, three: str, four: str) -> None:
    """No two pairs of parts are ambiguous."""
    same = (one, two) == (three, four)
    assert (KEYRING.callback_token(one, two) == KEYRING.callback_token(three, four)) is same


@given(ANY)
def test_an_encrypted_text_is_decrypted_unchanged(text: str) -> None:
    assert KEYRING.decrypt(KEYRING.encrypt(text)) == text


@given(st.lists(SECRETS, min_size=1, max_size=3), IDS, TIMES, st.binary())
def test_each_secret_signs_as_it_does_alone(
    secrets: list[str], id: str, timestamp: int, body: bytes
) -> None:
    """During a rotation, a receiver finds the signature of its own secret, over any bytes."""
    alone = [sign_webhook([secret], id, timestamp, body) for secret in secrets]
    assert sign_webhook(secrets, id, timestamp, body).split(" ") == alone


@given(SECRETS, IDS, st.integers(0, 4_000_000_000), st.text())
def test_our_signature_equals_the_one_of_the_standards_library(
    secret: str, id: str, timestamp: int, text: str
) -> None:
    theirs = standardwebhooks.Webhook(secret).sign(id, datetime.fromtimestamp(timestamp, UTC), text)
    assert sign_webhook([secret], id, timestamp, text.encode()) == theirs


@given(JSON_VALUES)
def test_canonical_json_is_a_fixed_point(value: object) -> None:
    """A value that is read back and written again stays the same, for any spelling of the input."""
    once = canonical_json(value)
    assert canonical_json(json.loads(once)) == once
    assert canonical_json(json.loads(json.dumps(value, indent=1, ensure_ascii=False))) == once
