"""The commands' way to the service: its API, by DARKROOM_URL and DARKROOM_API_KEY."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import typer

from service.errors import DarkroomError, NotConnected
from service.strict_json import JSON

if TYPE_CHECKING:
    import httpx

    from service.settings import Settings


class CommandFailed(DarkroomError):
    """What the command was to do did not happen; the text is its one line on standard error."""


class NobodyAnswers(CommandFailed):
    """No connection to the service was made."""


class Refused(CommandFailed):
    """The service said no."""


class Service:
    """One command's client. `admin`: without an API key the admin key will do."""

    def __init__(self, settings: "Settings", *, admin: bool = False) -> None:
        from service.net import service_client

        key = settings.api_key or (settings.admin_key if admin else None)
        self.url = settings.url
        self._has_key = key is not None
        self._client = service_client(settings.url, key.get_secret_value() if key else None)

    def call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: JSON | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> JSON:
        """The answer's JSON, {} for an empty one. Raises NobodyAnswers, Refused, CommandFailed."""
        known = {name: value for name, value in (params or {}).items() if value is not None}
        answer = self.send(method, path, params=known, json=body, headers=dict(headers or {}))
        if answer.status_code == 204:
            return {}
        try:
            document = answer.json()
            error = document["error"] if answer.is_error else None
            line = f"{error['code']}: {error['message']}" if error else ""
        except (ValueError, LookupError, TypeError):
            raise CommandFailed(
                f"{self.url} answered {answer.status_code}, but not as the service does: is"
                " DARKROOM_URL right?"
            ) from None
        if not answer.is_success or not isinstance(document, dict):
            hint = (
                " (DARKROOM_API_KEY is not set)"
                if answer.status_code == 401 and not self._has_key
                else ""
            )
            raise Refused((line or f"{self.url} answered {answer.status_code}") + hint)
        return document

    def send(self, method: str, path: str, **options: Any) -> "httpx.Response":
        from service.net import service_call

        try:
            return service_call(self._client, method, path, **options)
        except NotConnected:
            raise NobodyAnswers(
                f"no service answers at {self.url}: is DARKROOM_URL right?"
            ) from None

    def close(self) -> None:
        self._client.close()

    def fetch(self, path: str) -> bytes:
        """The bytes of a stored image; CommandFailed."""
        answer = self.send("GET", path)
        if answer.status_code != 200:
            raise CommandFailed(f"{self.url}{path} answered {answer.status_code}")
        return answer.content


@contextmanager
def service() -> Iterator[Service]:
    """The service of the environment; nothing but its address and a key is asked of the
    settings.
    """
    from service.settings import load_settings

    client = Service(load_settings())
    try:
        yield client
    finally:
        client.close()


def call(
    method: str, path: str, *, params: Mapping[str, Any] | None = None, body: JSON | None = None
) -> JSON:
    """`Service.call` of a command that needs no other."""
    with service() as client:
        return client.call(method, path, params=params, body=body)


def segment(text: str) -> str:
    """An id of the command line as one segment of a path."""
    if text in ("", ".", ".."):
        raise typer.BadParameter(f"{text!r} is no id")
    return quote(text, safe="")


def pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    """KEY=VALUE texts as a mapping."""
    made = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint=option)
        made[name] = value
    return made
