"""Who calls: API keys, their owners and scopes."""

import hmac
import time
from dataclasses import dataclass

import structlog
from starlette.requests import Request

from service.db.store import Store
from service.errors import ApiError
from service.signing import hash_api_key
from service.tasks import owner_keys

log = structlog.get_logger()

SCOPES = ("submit", "read", "subscribe", "admin")
CACHE_S = 3.0  # revocation acts within 5 s in every process
CACHE_KEYS = 10_000
KEY_PREFIX = "dk_"
HINT_CHARS = 8


def hint_of(key: str) -> str | None:
    """The beginning of what looks like a key of ours, for people; of anything else, which may be
    another's secret, nothing.
    """
    return key[:HINT_CHARS] if key.startswith(KEY_PREFIX) else None


@dataclass(frozen=True, slots=True)
class Caller:
    """`admin` has every scope and sees every owner."""

    owner: str
    scopes: frozenset[str]
    key: str  # its id

    def may(self, *scopes: str) -> bool:
        return "admin" in self.scopes or not self.scopes.isdisjoint(scopes)

    @property
    def sees(self) -> str | None:
        """The owner whose things are shown; None: everybody's."""
        return None if "admin" in self.scopes else self.owner


class Access:
    """Looks keys up; what the store said is believed for `CACHE_S`."""

    def __init__(self, store: Store, admin_key: str | None) -> None:
        self._store = store
        self._admin = hash_api_key(admin_key) if admin_key else None
        self._cache: dict[str, tuple[float, Caller | None]] = {}

    async def caller(self, request: Request, *scopes: str) -> Caller:
        """The caller, who has one of the scopes; ApiError 401 without a valid key, 403 without the
        scope.
        """
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        found = (
            await self._known(key.strip()) if scheme.lower() == "bearer" and key.strip() else None
        )
        if found is None:
            log.warning("auth.refused", reason="no valid key", hint=hint_of(key.strip()))
            raise ApiError(
                401, "unauthorized", "a valid API key is needed: Authorization: Bearer KEY"
            )
        if not found.may(*scopes):
            log.warning("auth.refused", reason=f"needs {' or '.join(scopes)}", owner=found.owner)
            raise ApiError(
                403, "permission_denied", f"the key needs the scope {' or '.join(scopes)}"
            )
        return found

    async def _known(self, key: str) -> Caller | None:
        hash = hash_api_key(key)
        if self._admin is not None and hmac.compare_digest(hash, self._admin):
            return Caller("admin", frozenset(SCOPES), "DARKROOM_ADMIN_KEY")
        until, caller = self._cache.get(hash, (0.0, None))
        if until > time.monotonic():
            return caller
        row = await self._store.read(owner_keys.key_row, hash)
        caller = Caller(row["owner"], frozenset(row["scopes"]), row["id"]) if row else None
        if len(self._cache) >= CACHE_KEYS:
            self._cache.clear()
        self._cache[hash] = (time.monotonic() + CACHE_S, caller)
        return caller
