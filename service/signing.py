"""Callback tokens, encrypted secrets, signatures of Standard Webhooks 1.0, digests of API keys.

Everything here is a pure function of its arguments. Only encryption takes random bytes.
"""

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from service.errors import ConfigurationError

KEY_BYTES = 32
KEPT = 512  # secrets and signers that stay in memory
TOKEN_BYTES = 20  # 160 bits: 32 base32 characters without padding
SECRET_PREFIX = "whsec_"  # noqa: S105 - a prefix, no secret


def _bytes(text: str) -> bytes:
    """Any text as bytes, lone surrogates too. Different texts become different bytes."""
    return text.encode("utf-8", "surrogatepass")


class Keyring:
    """The keys of `DARKROOM_SECRET_KEY`. The first key signs and encrypts. All keys verify and
    decrypt.

    HKDF (RFC 5869) derives a key for each purpose. ConfigurationError: there is no key, or one is
    shorter than 32 bytes.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        if not keys or any(len(key) < KEY_BYTES for key in keys):
            raise ConfigurationError(
                f"DARKROOM_SECRET_KEY: wants one key or more, each of at least {KEY_BYTES} bytes"
            )
        self._token_keys = [_derive(key, "callback token") for key in keys]
        self._link_keys = [_derive(key, "image link") for key in keys]
        boxes = [Fernet(base64.urlsafe_b64encode(_derive(key, "encryption"))) for key in keys]
        self._signer_keys = [_derive(key, "webhook signature") for key in keys]
        self._first, self._box = boxes[0], MultiFernet(boxes)
        # A backlog of webhooks has few endpoints, and takes as long to make their keys as to sign.
        self._opened = lru_cache(KEPT)(self._box.decrypt)
        self._signers = lru_cache(KEPT)(self._derive_signers)
        browser = [base64.urlsafe_b64encode(_derive(key, "console session")) for key in keys]
        self._browser = MultiFernet([Fernet(key) for key in browser])

    def sign_openly(self, endpoint_id: str, id: str, timestamp: int, body: bytes) -> str:
        """The signature `v1a,…` of a webhook. Its receiver checks it with a public key of the
        endpoint. No other endpoint has that key, so no receiver can pass the webhook on to another.
        """
        signature = self._signers(endpoint_id)[0].sign(_signed_content(id, timestamp, body))
        return "v1a," + base64.b64encode(signature).decode("ascii")

    def public_keys(self, endpoint_id: str) -> list[bytes]:
        """The public keys of `sign_openly`. The first one signs. The others did, or will."""
        return [each.public_key().public_bytes_raw() for each in self._signers(endpoint_id)]

    def _derive_signers(self, endpoint_id: str) -> list[Ed25519PrivateKey]:
        seeds = (hmac.digest(key, _bytes(endpoint_id), "sha256") for key in self._signer_keys)
        return [Ed25519PrivateKey.from_private_bytes(seed) for seed in seeds]

    def callback_token(self, upstream: str, task_id: str) -> str:
        """The last part of a callback URL. It proves that the caller was given the task's URL."""
        return _token(self._token_keys[0], upstream, task_id).decode("ascii")

    def hashed_token(self, upstream: str, task_id: str) -> str:
        """The stored form of the callback token."""
        return _hash(self.callback_token(upstream, task_id))

    def with_token(self, upstream: str, task_id: str, body: bytes) -> bytes:
        """The body with the callback token in the place of its hash. The hash says which key made
        the token, so that a body that is sent again has the same bytes after a new first key.
        """
        for key in self._token_keys:
            token = _token(key, upstream, task_id)
            body = body.replace(_hash(token.decode("ascii")).encode("ascii"), token)
        return body

    def callback_token_valid(self, upstream: str, task_id: str, token: str) -> bool:
        """Whether any key made the token. Takes the same time for each key and for none."""
        encoded, valid = _bytes(token), False
        for key in self._token_keys:
            valid |= hmac.compare_digest(_token(key, upstream, task_id), encoded)
        return valid

    def sign_link(self, image_id: str, expires: str) -> str:
        """The signature of a link to an image that expires at this second since 1970."""
        return _link_signature(self._link_keys[0], image_id, expires)

    def link_valid(self, image_id: str, expires: str, signature: str) -> bool:
        """Whether any key signed the link. Takes the same time for each key and for none."""
        encoded, valid = _bytes(signature), False
        for key in self._link_keys:
            valid |= hmac.compare_digest(_bytes(_link_signature(key, image_id, expires)), encoded)
        return valid

    def encrypt(self, text: str) -> bytes:
        """Encrypts a secret for the store. The service reads no Fernet timestamp, so it is 0."""
        return self._box.encrypt_at_time(_bytes(text), 0)

    def decrypt(self, data: bytes) -> str:
        """ConfigurationError: none of the keys encrypted it."""
        try:
            return self._opened(data).decode("utf-8", "surrogatepass")
        except InvalidToken:
            raise ConfigurationError(
                "DARKROOM_SECRET_KEY: no key of it decrypts what the store holds; put the old key"
                " back"
            ) from None

    def seal(self, text: str, now: int) -> str:
        """Signs and encrypts a cookie of the console at a time, in seconds."""
        return self._browser.encrypt_at_time(_bytes(text), now).decode("ascii").rstrip("=")

    def unseal(self, token: str, now: int, ttl_s: int) -> str | None:
        """The content of a cookie. None: no key of ours sealed it, or longer ago than `ttl_s`."""
        try:
            padded = _bytes(token + "=" * (-len(token) % 4))
            return self._browser.decrypt_at_time(padded, ttl_s, now).decode()
        except InvalidToken:
            return None

    def renewed(self, data: bytes) -> bytes | None:
        """The secret under the first key. None: it is so already. Raises ConfigurationError."""
        try:
            self._first.decrypt(data)
        except InvalidToken:
            return self.encrypt(self.decrypt(data))
        return None


@dataclass(frozen=True, slots=True)
class LinkSigner:
    """Gives links `expires` (seconds since 1970) and `signature`. `clock`: milliseconds."""

    keyring: Keyring
    ttl_s: int
    clock: Callable[[], int]

    def sign(self, image_id: str) -> str:
        expires = str(self.clock() // 1000 + self.ttl_s)
        return f"?expires={expires}&signature={self.keyring.sign_link(image_id, expires)}"

    def left_s(self, image_id: str, expires: str, signature: str) -> int | None:
        """How long the link still lives. None: no key of ours signed it."""
        if not self.keyring.link_valid(image_id, expires, signature):
            return None
        return int(expires) - self.clock() // 1000


def _derive(key: bytes, purpose: str) -> bytes:
    info = f"darkroom {purpose}".encode("ascii")
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(key)


def _link_signature(key: bytes, image_id: str, expires: str) -> str:
    return hmac.digest(key, _bytes(f"{image_id}\n{expires}"), "sha256")[:TOKEN_BYTES].hex()


def _token(key: bytes, upstream: str, task_id: str) -> bytes:
    """Each part is signed behind its length in 8 bytes, so that "a", "bc" and "ab", "c" differ."""
    parts = [_bytes(part) for part in ("callback", upstream, task_id)]
    content = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    return base64.b32encode(hmac.digest(key, content, "sha256")[:TOKEN_BYTES]).lower()


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("ascii")).hexdigest()


def new_secret(random: bytes) -> str:
    """`whsec_…` of 24 to 64 random bytes, the lengths that the standard allows (ValueError)."""
    if not 24 <= len(random) <= 64:
        raise ValueError("a webhook secret wants 24 to 64 random bytes")
    return SECRET_PREFIX + base64.b64encode(random).decode("ascii")


def _signature(secret: str, content: bytes) -> str:
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not key:
        raise ValueError("a webhook secret is whsec_ and base64")
    return "v1," + base64.b64encode(hmac.digest(key, content, "sha256")).decode("ascii")


def sign_webhook(secrets: Sequence[str], id: str, timestamp: int, body: bytes) -> str:
    """The `webhook-signature` header: one `v1,…` per secret, space-separated. `timestamp` is in
    seconds.

    ValueError: a malformed secret, no secret, or an id with a full stop. The full stop separates
    the signed parts, so such an id could pass for another id and timestamp.
    """
    if not secrets or not id or "." in id:
        raise ValueError("signing wants a secret, and an id without a full stop")
    content = _signed_content(id, timestamp, body)
    return " ".join(_signature(secret, content) for secret in secrets)


def _signed_content(id: str, timestamp: int, body: bytes) -> bytes:
    return b".".join((_bytes(id), str(timestamp).encode("ascii"), body))


def hash_api_key(key: str) -> str:
    """SHA-256 in hexadecimal. Keys are long and random, so that no slow hash is needed."""
    return hashlib.sha256(_bytes(key)).hexdigest()


def canonical_json(value: object) -> bytes:
    """The same bytes for equal JSON, 1.0 as 1. ValueError: NaN, infinity. TypeError: not JSON."""
    value = _with_whole_numbers(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _with_whole_numbers(value: object) -> object:
    if isinstance(value, dict):
        return {name: _with_whole_numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
