"""The command line's HTTP client for the service itself."""

import ssl
from typing import Any

import httpx

from service import VERSION
from service.errors import CallTimedOut, ConnectionLost, NotConnected

USER_AGENT = f"Darkroom/{VERSION}"
# Seconds for TCP and TLS to one address. An address that drops packets must not use up the whole
# time of a long call.
CONNECT = 10.0
READ_S = 150.0  # `Prefer: wait` holds a response for up to 120 s


def usual_trust() -> ssl.SSLContext:
    """Trusts the certificates of `SSL_CERT_FILE`, otherwise certifi's."""
    return httpx.create_ssl_context()


def service_client(base_url: str, api_key: str | None) -> httpx.Client:
    """A client without a guard. It follows no redirect and ignores proxies of the environment,
    which would see the key.
    """
    key = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    return httpx.Client(
        base_url=base_url,
        headers={"user-agent": USER_AGENT, **key},
        timeout=httpx.Timeout(READ_S, connect=CONNECT),
        follow_redirects=False,
        trust_env=False,
        verify=usual_trust(),
    )


def service_call(client: httpx.Client, method: str, path: str, **options: Any) -> httpx.Response:
    """One request, with any status. Raises NotConnected, CallTimedOut, ConnectionLost."""
    try:
        return client.request(method, path, **options)
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise NotConnected(f"{client.base_url.host}: no connection") from error
    except httpx.TimeoutException as error:
        raise CallTimedOut(f"{client.base_url.host}: no answer in time") from error
    except httpx.HTTPError as error:
        raise ConnectionLost(f"{client.base_url.host}: the connection broke") from error
