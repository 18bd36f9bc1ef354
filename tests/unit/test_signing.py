"""Callback tokens, encrypted secrets, and Standard Webhooks signatures, which the standard's
library and Svix's library verify.
"""

import base64
import importlib
import json
import time

import pytest
import standardwebhooks

from service.errors import ConfigurationError
from service.signing import Keyring, canonical_json, hash_api_key, new_secret, sign_webhook

OLD, NEW = b"o" * 32, b"n" * 40
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
ID, AT, BODY = "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'
SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
HOSTILE = ["", "\0", "é", "\ud800", "a" * 1_000_000, "=" * 32, " ", "v1,"]


# --- callback tokens
# --------------------------------------------------------------------------------------------------


def test_a_token_is_lower_case_base32_of_160_bits() -> None:
    """It needs no escaping in a path segment."""
    token = Keyring([OLD]).callback_token("evolink", "task_1")
    assert len(token) == 32
    assert len(base64.b32decode(token.upper())) == 20
    assert token == token.lower()


def test_a_token_is_valid_only_for_its_task_and_upstream() -> None:
    keyring = Keyring([OLD])
    token = keyring.callback_token("evolink", "task_1")
    assert keyring.callback_token_valid("evolink", "task_1", token)
    assert not keyring.callback_token_valid("evolink", "task_2", token)
    assert not keyring.callback_token_valid("other", "task_1", token)
    assert not Keyring([NEW]).callback_token_valid("evolink", "task_1", token)


@pytest.mark.parametrize(
    ("one", "other"),
    [(("a|bc", ""), ("a", "bc")), (("a", "bc"), ("ab", "c")), (("a|b", "c"), ("a", "b|c"))],
)
def test_parts_cannot_be_shifted_into_each_other(
    one: tuple[str, str], other: tuple[str, str]
) -> None:
    """The hash delimits its parts by length."""
    keyring = Keyring([OLD])
    assert keyring.callback_token(*one) != keyring.callback_token(*other)


def test_a_token_of_any_key_is_valid_and_the_first_key_signs() -> None:
    """A rotation appends the new key everywhere, moves it to the first place, and drops the old
    one.
    """
    old = Keyring([OLD]).callback_token("evolink", "task_1")
    new = Keyring([NEW]).callback_token("evolink", "task_1")
    appended, moved = Keyring([OLD, NEW]), Keyring([NEW, OLD])
    assert appended.callback_token("evolink", "task_1") == old
    assert moved.callback_token("evolink", "task_1") == new
    for keyring in (appended, moved):
        assert keyring.callback_token_valid("evolink", "task_1", old)
        assert keyring.callback_token_valid("evolink", "task_1", new)


def test_a_body_gets_its_token_in_the_place_of_the_hash() -> None:
    """The key that made the token makes it again, in whatever place it is. Without that key the
    hash stays, and other bytes never change.
    """
    keyring = Keyring([OLD])
    body = b'{"a":"%s"}' % keyring.hashed_token("evolink", "task_1").encode()
    token = keyring.callback_token("evolink", "task_1").encode()
    assert token not in body
    for keys in ([OLD], [OLD, NEW], [NEW, OLD]):
        assert Keyring(keys).with_token("evolink", "task_1", body) == b'{"a":"%s"}' % token
    assert Keyring([NEW]).with_token("evolink", "task_1", body) == body
    assert keyring.with_token("evolink", "task_2", body) == body
    assert keyring.with_token("other", "task_1", body) == body
    assert keyring.with_token("evolink", "task_1", b"\x00\xff{") == b"\x00\xff{"


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_token_or_task_is_invalid(text: str) -> None:
    """The caller chooses every part of the path, so no part may raise."""
    keyring = Keyring([OLD])
    assert not keyring.callback_token_valid("evolink", "task_1", text)
    assert not keyring.callback_token_valid(text, text, text)


@pytest.mark.parametrize("keys", [[], [b"short"], [OLD, b"n" * 31]])
def test_a_missing_or_short_key_stops_the_start(keys: list[bytes]) -> None:
    """Each key needs at least 32 bytes. The error names the setting and shows no key."""
    with pytest.raises(ConfigurationError, match=r"^DARKROOM_SECRET_KEY: [^\n]*$") as caught:
        Keyring(keys)
    assert "short" not in str(caught.value)


# --- secrets at rest
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE)
def test_an_encrypted_secret_is_decrypted_unchanged(text: str) -> None:
    """This holds for any text."""
    keyring = Keyring([OLD])
    sealed = keyring.encrypt(text)
    assert keyring.decrypt(sealed) == text
    assert len(text) < 8 or text.encode("utf-8", "surrogatepass") not in sealed


def test_secrets_survive_a_rotation_until_the_old_key_is_dropped() -> None:
    """All keys decrypt, and the first key encrypts. A secret of a dropped key is a configuration
    error in one line.
    """
    sealed = Keyring([OLD]).encrypt("whsec_x")
    assert Keyring([NEW, OLD]).decrypt(sealed) == "whsec_x"
    assert Keyring([NEW]).decrypt(Keyring([NEW, OLD]).encrypt("y")) == "y"
    with pytest.raises(ConfigurationError, match=r"^DARKROOM_SECRET_KEY: [^\n]*$"):
        Keyring([NEW]).decrypt(sealed)


@pytest.mark.parametrize("data", [b"", b"\xff\0", b"gAAAA", b"a" * 1000])
def test_data_that_was_never_encrypted_is_a_configuration_error(data: bytes) -> None:
    """A damaged row raises an error of ours, not the library's."""
    with pytest.raises(ConfigurationError):
        Keyring([OLD]).decrypt(data)


def test_a_secret_is_renewed_under_the_first_key() -> None:
    """It is renewed once. A secret that no key decrypts is a configuration error."""
    sealed = Keyring([OLD]).encrypt("whsec_x")
    renewed = Keyring([NEW, OLD]).renewed(sealed)
    assert renewed is not None
    assert Keyring([NEW]).decrypt(renewed) == "whsec_x"
    assert Keyring([NEW, OLD]).renewed(renewed) is None
    with pytest.raises(ConfigurationError):
        Keyring([NEW]).renewed(sealed)


def test_the_time_of_encryption_is_not_kept() -> None:
    """Fernet's time stamp is zero, so no clock is read."""
    assert base64.urlsafe_b64decode(Keyring([OLD]).encrypt("x"))[1:9] == bytes(8)


# --- Standard Webhooks
# -------------------------------------------------------------------------------------------------


def test_the_published_vector_is_signed_as_published() -> None:
    """It is the example of the standard's own test suite."""
    assert sign_webhook([SECRET], ID, AT, BODY) == SIGNATURE


@pytest.mark.parametrize("package", ["standardwebhooks", "svix.webhooks"])
@pytest.mark.parametrize("size", [24, 32, 33, 64])
def test_the_libraries_accept_our_signatures(package: str, size: int) -> None:
    """A subscriber with either library verifies deliveries with the old secret and with the new
    one.
    """
    library = importlib.import_module(package).Webhook
    old, new = new_secret(bytes(range(size))), new_secret(bytes(range(1, size + 1)))
    at = int(time.time())
    body = json.dumps({"prompt": "雪 \N{SNOWMAN}"}, ensure_ascii=False).encode()
    headers = {
        "webhook-id": "evt_1",
        "webhook-timestamp": str(at),
        "webhook-signature": sign_webhook([new, old], "evt_1", at, body),
    }
    for secret in (old, new):
        library(secret).verify(body, headers)
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        library(new_secret(bytes(size))).verify(body, headers)


def test_an_id_with_a_full_stop_is_not_signed() -> None:
    """Its delimiter would be ambiguous: id `a`, time 1, body `2.b` would have the signature of id
    `a.1`, time 2, body `b`.
    """
    with pytest.raises(ValueError, match="full stop"):
        sign_webhook([SECRET], "a.1", AT, b"b")


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_!!!!", "whsec_AAA", "whsec_é", "\ud800"])
def test_a_malformed_secret_is_our_own_fault(secret: str) -> None:
    """It raises without showing the secret."""
    with pytest.raises(ValueError, match="a webhook secret is whsec_ and base64"):
        sign_webhook([secret], ID, AT, BODY)


@pytest.mark.parametrize("size", [0, 23, 65])
def test_a_secret_has_24_to_64_bytes(size: int) -> None:
    """These are the standard's limits."""
    with pytest.raises(ValueError, match="24 to 64"):
        new_secret(bytes(size))


@pytest.mark.parametrize(("secrets", "id"), [([], ID), ([SECRET], "")])
def test_nothing_is_signed_without_a_secret_or_an_id(secrets: list[str], id: str) -> None:
    """A delivery must not leave without a signature."""
    with pytest.raises(ValueError, match="signing wants"):
        sign_webhook(secrets, id, AT, BODY)


# --- digests and comparisons
# -------------------------------------------------------------------------------------------


def test_an_api_key_is_kept_as_its_sha256() -> None:
    """The digest of `abc` is well known."""
    assert hash_api_key("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert all(len(hash_api_key(text)) == 64 for text in HOSTILE)


def test_equal_json_has_one_spelling() -> None:
    """The order of keys and white space do not matter. Types do."""
    assert (
        canonical_json(json.loads('{ "b": [1, null], "a": "\u00e9" }'))
        == b'{"a":"\\u00e9","b":[1,null]}'
    )
    assert canonical_json({"n": [1.0, -0.0, 1e3, 0.5]}) == b'{"n":[1,0,1000,0.5]}'
    assert canonical_json({"n": 1}) != canonical_json({"n": "1"})
    assert canonical_json({"n": 1}) != canonical_json({"n": True})


def test_a_value_that_is_not_json_raises() -> None:
    """NaN and objects do not become text."""
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))
    with pytest.raises(TypeError):
        canonical_json(object())
