"""API keys: the caller of a request, its owner and its scopes."""

import hmac
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass

import structlog
from starlette.requests import Request

from service.db.batching import BatchingStore
from service.errors import ApiError
from service.signing import hash_api_key
from service.tasks import owner_keys
from service.web.sessions import Sessions

log = structlog.get_logger()

SCOPES = ("submit", "read", "subscribe", "admin")
CACHE_S = 3.0  # revocation must take effect within 5 s in every process
CACHE_KEYS = 10_000
KEY_PREFIX = "dk_"
HINT_CHARS = 8
# EventSource and <img> send no header, so that these paths accept the console's cookie.
BY_SESSION = re.compile(r"/v1/events|/v1/files/[^/]+/content")


@dataclass(frozen=True, slots=True)
class Caller:
    """The scope `admin` includes every scope and every owner's data."""

    owner: str
    scopes: frozenset[str]
    key: str  # its id

    @property
    def sees(self) -> str | None:
        """The only owner with data that the caller sees, or None for every owner."""
        return None if "admin" in self.scopes else self.owner

    def has(self, scopes: Iterable[str]) -> bool:
        """Whether the key has one of the scopes."""
        return not self.scopes.isdisjoint({"admin", *scopes})


def caller_of(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


class Access:
    """Looks up API keys, and caches what the store answers. `sessions` None: without console."""

    def __init__(
        self, store: BatchingStore, admin_key: str | None, sessions: Sessions | None = None
    ) -> None:
        self._store, self.sessions = store, sessions
        self._admin = hash_api_key(admin_key) if admin_key else None
        self._cache: dict[str, tuple[float, Caller]] = {}  # of valid keys

    async def caller(self, request: Request, *scopes: str) -> Caller:
        """A caller with one of the scopes. Raises ApiError 401 without a valid key, else 403."""
        scheme, _, text = request.headers.get("authorization", "").partition(" ")
        key = text.strip()
        caller = await self.by_key(key) if scheme.lower() == "bearer" and key else None
        if not key and request.method == "GET" and BY_SESSION.fullmatch(request.url.path):
            caller = await self.signed_in(request)
        if caller is None:
            # Any other text may be a secret of another service.
            hint = key[:HINT_CHARS] if key.startswith(KEY_PREFIX) else None
            log.warning("auth.refused", reason="no valid key", hint=hint)
            message = "a valid API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, "unauthorized", message)
        if not caller.has(scopes):
            log.warning("auth.refused", reason=f"needs {' or '.join(scopes)}", owner=caller.owner)
            message = f"the key needs the scope {' or '.join(scopes)}"
            raise ApiError(403, "permission_denied", message)
        return caller

    async def signed_in(self, request: Request) -> Caller | None:
        """The caller whose key signed in to the console, while the key is valid."""
        session = self.sessions.read(request) if self.sessions else None
        return await self._lookup(session.key_hash) if session and session.key_hash else None

    async def by_key(self, key: str) -> Caller | None:
        return await self._lookup(hash_api_key(key))

    async def _lookup(self, hash: str) -> Caller | None:
        if self._admin is not None and hmac.compare_digest(hash, self._admin):
            return Caller("admin", frozenset(SCOPES), "DARKROOM_ADMIN_KEY")
        if (cached := self._cache.get(hash)) and cached[0] > time.monotonic():
            return cached[1]
        row = await self._store.look_up(owner_keys.key_row, hash)
        if row is None:
            return None
        caller = Caller(row["owner"], frozenset(row["scopes"]), row["id"])
        if len(self._cache) >= CACHE_KEYS:
            self._cache.clear()
        self._cache[hash] = (time.monotonic() + CACHE_S, caller)
        return caller
