"""The client commands' connection to the API of a place."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import typer

from service.cli.place import Place, place
from service.errors import DarkroomError, NotConnected
from service.strict_json import JSON

if TYPE_CHECKING:
    from service.net.service_client import ServiceAnswer


GATEWAY = (502, 503, 504)
# What removes an alpha channel, in the words of the API and here.
FLATTENING = "An upload with ?flatten=white", "darkroom files upload --flatten"


class CommandFailed(DarkroomError):
    """The text is the one line on standard error. `error`: the fields that `--json` shows."""

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


class ServiceBusy(CommandFailed):
    """The service, or a proxy before it, answered 429, 502, 503 or 504."""

    code = "service_busy"


class ApiClient:
    """One command's client. With `admin` the admin key stands in for a missing API key."""

    def __init__(self, at: Place, *, admin: bool = False) -> None:
        from service.net.service_client import ServiceClient

        self.at, self.url = at, at.url
        key = at.api_key or (at.admin_key if admin else None)
        self._has_key = key is not None
        self._client = ServiceClient(at.url, key)

    def call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: JSON | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> JSON:
        """The JSON object, {} for 204, or CommandFailed. Parameters that are None are left out."""
        query = {name: value for name, value in (params or {}).items() if value is not None}
        return self._document(self._send(method, path, params=query, body=body, headers=headers))

    def upload(self, path: str, file: Path, *, params: Mapping[str, str] | None = None) -> JSON:
        """The response to a file in a form. CommandFailed names the file and the option."""
        with file.open("rb") as content:
            response = self._send("POST", path, params=params, file=content)
        try:
            return self._document(response)
        except CommandFailed as error:
            text = f"{file}: {error}".replace(*FLATTENING)
            raise type(error)(text, error.error and {**error.error, "message": text}) from None

    def _document(self, answer: "ServiceAnswer") -> JSON:
        if answer.status == 204:
            return {}
        failed = ServiceBusy if answer.status in (429, *GATEWAY) else CommandFailed
        try:
            document = answer.json()
            error = document["error"] if answer.status >= 400 else None
            reason = f"{error['code']}: {error['message']}" if error else ""
        except (ValueError, LookupError, TypeError):
            behind = " and the service behind it at work" if answer.status in GATEWAY else ""
            raise failed(
                f"{self.url} answered {answer.status}, but not as the service does:"
                f" is {self.variable} right{behind}?"
            ) from None
        if 200 <= answer.status < 300 and isinstance(document, dict):
            return document
        reason = reason or f"{self.url} answered {answer.status}"
        if answer.status == 401:
            check_names()
            key = "of DARKROOM_API_KEY" if self._has_key else "(DARKROOM_API_KEY is not set)"
            reason = f"{reason}; {self.at} got {'the' if self._has_key else 'no'} key {key}"
        raise failed(reason, error)

    @property
    def variable(self) -> str:
        """What names the address."""
        return "--url" if self.at.named_by == "--url" else "DARKROOM_URL"

    def fetch(self, path: str) -> bytes:
        answer = self._send("GET", path)
        if answer.status != 200:
            raise CommandFailed(f"{self.url}{path} answered {answer.status}")
        return answer.content

    def _send(self, method: str, path: str, **options: Any) -> "ServiceAnswer":
        try:
            return self._client.call(method, path, **options)
        except NotConnected as error:
            if "SSL" in (cause := f"{type(error.__cause__).__name__}: {error.__cause__}"):
                raise CommandFailed(
                    f"{self.url}: {cause}. If a private CA signed its certificate, set"
                    " SSL_CERT_FILE to the file of that CA"
                ) from None
            check_names()
            raise ServiceUnreachable(
                f"no service answers at {self.url}: is {self.variable} right?"
            ) from None


def check_names() -> None:
    """A wrong name of a variable is a likely cause of a failure. ConfigurationError names it."""
    from service.settings import load_settings

    load_settings()


def api_client() -> ApiClient:
    return ApiClient(place())


def segment(text: str) -> str:
    """An id of the command line as one segment of a path."""
    if text in ("", ".", ".."):
        raise typer.BadParameter(f"{text!r} is no id")
    return quote(text, safe="")


def pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    values = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint=option)
        values[name] = value
    return values
