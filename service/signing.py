"""What is signed, sealed or hashed: callback tokens, secrets at rest, Standard Webhooks, API keys,
canonical JSON.

No clock and no I/O (sealing alone takes random bytes from the system). Parts that are signed
together are delimited by their lengths.
"""

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Sequence

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from service.errors import ConfigurationError

KEY_BYTES = 32
TOKEN_BYTES = 20  # 160 bits: 32 base32 characters without padding
SECRET_PREFIX = "whsec_"  # noqa: S105 - a prefix, no secret


def _bytes(text: str) -> bytes:
    """Any `str` as bytes, lone surrogates too; different texts never become the same bytes."""
    return text.encode("utf-8", "surrogatepass")


def _delimited(*parts: str) -> bytes:
    """Each part behind its length in 8 bytes, so that "a", "bc" and "ab", "c" differ."""
    encoded = [_bytes(part) for part in parts]
    return b"".join(len(part).to_bytes(8, "big") + part for part in encoded)


class Keyring:
    """The keys of `DARKROOM_SECRET_KEY`: the first signs and encrypts, all verify and decrypt.

    Each purpose has a key of its own, derived by HKDF (RFC 5869). ConfigurationError: no key, or
    one under 32 bytes.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        if not keys or any(len(key) < KEY_BYTES for key in keys):
            raise ConfigurationError(
                f"DARKROOM_SECRET_KEY: wants one key or more, each of at least {KEY_BYTES} bytes"
            )
        self._token_keys = [_derive(key, "callback token") for key in keys]
        boxes = [Fernet(base64.urlsafe_b64encode(_derive(key, "encryption"))) for key in keys]
        self._first, self._box = boxes[0], MultiFernet(boxes)

    def callback_token(self, upstream: str, task_id: str) -> str:
        """The last part of a callback URL: 32 lower-case base32 characters that prove who calls for
        this task.
        """
        return _token(self._token_keys[0], upstream, task_id).decode("ascii")

    def callback_token_valid(self, upstream: str, task_id: str, token: str) -> bool:
        """Whether any key made the token, for any three texts whatsoever; takes the same time
        whichever did, and if none.
        """
        given, valid = _bytes(token), False
        for key in self._token_keys:
            valid |= hmac.compare_digest(_token(key, upstream, task_id), given)
        return valid

    def encrypt(self, text: str) -> bytes:
        """A secret as it is stored. The time that Fernet writes into it is left at 0: nothing here
        expires by it.
        """
        return self._box.encrypt_at_time(_bytes(text), 0)

    def decrypt(self, data: bytes) -> str:
        """ConfigurationError: none of the keys fits, because the one that encrypted was dropped."""
        try:
            return self._box.decrypt(data).decode("utf-8", "surrogatepass")
        except InvalidToken:
            raise ConfigurationError(
                "DARKROOM_SECRET_KEY: no key of it decrypts what the store holds; put the old key"
                " back"
            ) from None

    def renewed(self, data: bytes) -> bytes | None:
        """The same secret under the first key; None: it is so already. ConfigurationError as
        `decrypt`.
        """
        try:
            self._first.decrypt(data)
        except InvalidToken:
            return self.encrypt(self.decrypt(data))
        return None


def _derive(key: bytes, purpose: str) -> bytes:
    return HKDF(
        algorithm=SHA256(), length=32, salt=None, info=f"darkroom {purpose}".encode("ascii")
    ).derive(key)


def _token(key: bytes, upstream: str, task_id: str) -> bytes:
    signature = hmac.digest(key, _delimited("callback", upstream, task_id), "sha256")
    return base64.b32encode(signature[:TOKEN_BYTES]).lower()


# --- Standard Webhooks 1.0 (https://www.standardwebhooks.com)
# ----------------------------------------------------------


def new_secret(random: bytes) -> str:
    """`whsec_…` of 24 to 64 random bytes, the lengths the standard allows (ValueError)."""
    if not 24 <= len(random) <= 64:
        raise ValueError("a webhook secret wants 24 to 64 random bytes")
    return SECRET_PREFIX + base64.b64encode(random).decode("ascii")


def _secret_key(secret: str) -> bytes:
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not key:
        raise ValueError("a webhook secret is whsec_ and base64")
    return key


def _signature(secret: str, id: str, timestamp: str, body: bytes) -> bytes:
    content = b".".join((_bytes(id), timestamp.encode("ascii"), body))
    return b"v1," + base64.b64encode(hmac.digest(_secret_key(secret), content, "sha256"))


def sign_webhook(secrets: Sequence[str], id: str, timestamp: int, body: bytes) -> str:
    """The `webhook-signature` header: `v1,…` per secret, space-separated, over the bytes sent.
    `timestamp` in seconds.

    ValueError: a malformed secret, none at all, or an id with a full stop, which could move into
    the timestamp.
    """
    if not secrets or not id or "." in id:
        raise ValueError("signing wants a secret, and an id without a full stop")
    return b" ".join(_signature(secret, id, str(timestamp), body) for secret in secrets).decode(
        "ascii"
    )


# --- digests and comparisons
# -------------------------------------------------------------------------------------------


def hash_api_key(key: str) -> str:
    """SHA-256 in hexadecimal, as the store keeps a key: keys are random and long, so that no slow
    hash is needed.
    """
    return hashlib.sha256(_bytes(key)).hexdigest()


def canonical_json(value: object) -> bytes:
    """One spelling for equal JSON: sorted keys, no spaces, ASCII. ValueError: NaN or an infinity;
    TypeError: not JSON.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
