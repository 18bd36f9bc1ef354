"""The client commands' connection to the API, by DARKROOM_URL and DARKROOM_API_KEY."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import typer

from service.errors import DarkroomError, NotConnected
from service.strict_json import JSON

if TYPE_CHECKING:
    import httpx

    from service.settings import Settings


class CommandFailed(DarkroomError):
    """The command failed. The text is its one line on standard error. `error`: the fields that
    `--json` shows, by default those of a failure without the API.
    """

    code = "failed"

    def __init__(self, text: str, error: JSON | None = None) -> None:
        super().__init__(text)
        self.error = error or {}


class Interrupted(CommandFailed):
    """Ctrl-C, after something was sent."""

    code = "interrupted"


class ServiceUnreachable(CommandFailed):
    """No connection to the service was made."""

    code = "service_unreachable"


class ApiClient:
    """One command's client. With `admin` the admin key stands in for a missing API key."""

    def __init__(self, settings: "Settings", *, admin: bool = False) -> None:
        from service.net.service_client import service_client

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
        """The response's JSON object, {} for 204. CommandFailed says why there is none.

        Parameters that are None are left out of the query.
        """
        query = {name: value for name, value in (params or {}).items() if value is not None}
        return self._document(
            self._send(method, path, params=query, json=body, headers=dict(headers or {}))
        )

    def upload(self, path: str, file: Path, *, params: Mapping[str, str] | None = None) -> JSON:
        """The response to the file in a form. CommandFailed names the file."""
        with file.open("rb") as content:
            form = {"file": (file.name, content)}
            response = self._send("POST", path, params=dict(params or {}), files=form)
        try:
            return self._document(response)
        except CommandFailed as error:
            raise CommandFailed(f"{file}: {error}") from None

    def _document(self, response: "httpx.Response") -> JSON:
        if response.status_code == 204:
            return {}
        try:
            document = response.json()
            error = document["error"] if response.is_error else None
            reason = f"{error['code']}: {error['message']}" if error else ""
        except (ValueError, LookupError, TypeError):
            raise CommandFailed(
                f"{self.url} answered {response.status_code}, but not as the service does:"
                " is DARKROOM_URL right?"
            ) from None
        if response.is_success and isinstance(document, dict):
            return document
        keyless = response.status_code == 401 and not self._has_key
        raise CommandFailed(
            (reason or f"{self.url} answered {response.status_code}")
            + (" (DARKROOM_API_KEY is not set)" if keyless else ""),
            error,
        )

    def fetch(self, path: str) -> bytes:
        """The bytes of a stored image."""
        response = self._send("GET", path)
        if response.status_code != 200:
            raise CommandFailed(f"{self.url}{path} answered {response.status_code}")
        return response.content

    def _send(self, method: str, path: str, **options: Any) -> "httpx.Response":
        from service.net.service_client import service_call

        try:
            return service_call(self._client, method, path, **options)
        except NotConnected as error:
            if "SSL" in (cause := str(error.__cause__)):
                raise CommandFailed(
                    f"{self.url}: {cause}. If a private CA signed its certificate, set"
                    " SSL_CERT_FILE to the file of that CA"
                ) from None
            raise ServiceUnreachable(
                f"no service answers at {self.url}: is DARKROOM_URL right?"
            ) from None

    def close(self) -> None:
        self._client.close()


@contextmanager
def api_client() -> Iterator[ApiClient]:
    from service.settings import load_settings

    client = ApiClient(load_settings())
    try:
        yield client
    finally:
        client.close()


def segment(text: str) -> str:
    """An id of the command line as one segment of a path."""
    if text in ("", ".", ".."):
        raise typer.BadParameter(f"{text!r} is no id")
    return quote(text, safe="")


def pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    """KEY=VALUE texts as a mapping."""
    values = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint=option)
        values[name] = value
    return values
