"""Sessions of the console: a sealed cookie, which every process accepts."""

import json
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

from starlette.requests import Request

from service.signing import Keyring

COOKIE, FLASH = "darkroom_session", "darkroom_flash"
SESSION_S, FLASH_S = 12 * 3600, 60


@dataclass(frozen=True, slots=True)
class Session:
    """`csrf`: what the forms of this session contain. `key_hash` None: before the sign-in."""

    csrf: str
    key_hash: str | None = None


@dataclass(frozen=True, slots=True)
class Sessions:
    """Seals and opens the cookies of browsers. `base_url`: the service's public address."""

    keyring: Keyring
    clock: Callable[[], int]  # milliseconds
    base_url: str

    def read(self, request: Request) -> Session | None:
        """The session of a request, within `SESSION_S` of the sign-in."""
        text = self._opened(request, COOKIE, SESSION_S)
        return Session(**json.loads(text)) if text else None

    def flash(self, request: Request) -> list[str] | None:
        """The kind and the text of the message that the last act left."""
        text = self._opened(request, FLASH, FLASH_S)
        return json.loads(text)["flash"] if text else None

    def start(self, key_hash: str | None = None) -> tuple[Session, str]:
        """A new session, and the `Set-Cookie` header that brings it to the browser."""
        session = Session(secrets.token_urlsafe(24), key_hash)
        return session, self.cookie(COOKIE, json.dumps(asdict(session)), SESSION_S)

    def cookie(self, name: str, text: str, age_s: int) -> str:
        """A `Set-Cookie` header. An age of 0 removes the cookie."""
        value = self.keyring.seal(text, self._now()) if age_s else ""
        secure = "; Secure" if self.base_url.startswith("https:") else ""
        return f"{name}={value}; Max-Age={age_s}; Path=/; HttpOnly; SameSite=Strict{secure}"

    def same_origin(self, request: Request) -> bool:
        """Whether a page of the service sent the request. Clients that are no browsers send none of
        the headers, and no other site can make a browser leave them out.
        """
        origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
        if site not in (None, "same-origin", "none"):
            return False
        hosts = (urlsplit(self.base_url).netloc, request.headers.get("host"))
        return origin is None or urlsplit(origin).netloc in hosts

    def _opened(self, request: Request, name: str, age_s: int) -> str | None:
        value = request.cookies.get(name)
        return self.keyring.unseal(value, self._now(), age_s) if value else None

    def _now(self) -> int:
        return self.clock() // 1000
