"""The command line's HTTP client for the service itself, of the standard library: a command must
not wait for the import of a larger one.
"""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urlencode, urlsplit

from service import VERSION
from service.errors import CallTimedOut, ConnectionLost, NotConnected
from service.net.multipart import form_edges

if TYPE_CHECKING:
    import ssl

USER_AGENT = f"Darkroom/{VERSION}"
# Seconds for TCP and TLS to one address. An address that drops packets must not use up the whole
# time of a long call.
CONNECT = 10.0
READ_S = 150.0  # `Prefer: wait` holds a response for up to 120 s
CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class ServiceAnswer:
    status: int
    content: bytes

    def json(self) -> Any:
        """The body as JSON. Raises ValueError."""
        return json.loads(self.content)


class ServiceClient:
    """A client without a guard. It follows no redirect and ignores proxies of the environment,
    which would see the key. Each call has a connection of its own.
    """

    def __init__(self, base_url: str, api_key: str | None) -> None:
        parts = urlsplit(base_url)
        self._host, self._path = parts.hostname or "", parts.path
        self._tls = usual_trust() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        key = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._headers = {"user-agent": USER_AGENT, "connection": "close", **key}

    def call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        file: BinaryIO | None = None,
        content: bytes | Iterable[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> ServiceAnswer:
        """One request, with any status. Raises NotConnected, CallTimedOut, ConnectionLost."""
        path = f"{self._path}{path}" + (f"?{urlencode(params)}" if params else "")
        fields = dict(headers or {})
        if body is not None:
            content = json.dumps(body).encode()
            fields["content-type"] = "application/json"
        if file is not None:
            name, boundary = Path(file.name).name, os.urandom(16).hex()
            head, tail = form_edges(boundary, name, "application/octet-stream")
            length = len(head) + os.fstat(file.fileno()).st_size + len(tail)
            fields["content-type"] = f"multipart/form-data; boundary={boundary}"
            fields["content-length"] = str(length)
            content = chain([head], iter(lambda: file.read(CHUNK), b""), [tail])
        connection = self._connected()
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # the response may say why
                connection.request(method, path, content, self._headers | fields)
            response = connection.getresponse()
            return ServiceAnswer(response.status, response.read())
        except TimeoutError as error:
            raise CallTimedOut(f"{self._host}: no answer in time") from error
        except (OSError, HTTPException) as error:
            raise ConnectionLost(f"{self._host}: the connection broke") from error
        finally:
            connection.close()

    def _connected(self) -> HTTPConnection:
        if self._tls is None:
            connection = HTTPConnection(self._host, self._port, timeout=CONNECT)
        else:
            connection = HTTPSConnection(self._host, self._port, timeout=CONNECT, context=self._tls)
        try:
            connection.connect()
        except (OSError, UnicodeError) as error:  # a name that no name server could know
            connection.close()
            raise NotConnected(f"{self._host}: no connection") from error
        connection.sock.settimeout(READ_S)
        return connection


def usual_trust() -> "ssl.SSLContext":
    """Trusts the certificates of SSL_CERT_FILE or SSL_CERT_DIR, otherwise certifi's."""
    return _trust(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@cache  # reading the certificates takes 45 ms
def _trust(file: str | None, folder: str | None) -> "ssl.SSLContext":
    import ssl

    if file or folder:
        return ssl.create_default_context(cafile=file or None, capath=None if file else folder)
    import certifi

    return ssl.create_default_context(cafile=certifi.where())
