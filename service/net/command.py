"""The command line's way to the service itself."""

from typing import Any

import httpx

from service.errors import CallTimedOut, ConnectionLost, NotConnected
from service.net.transport import CONNECT, USER_AGENT


def service_client(base_url: str, api_key: str | None) -> httpx.Client:
    """The command line's own client of the service: no guard, follows nothing; reads for as long as
    an answer may be held back.
    """
    headers = {"user-agent": USER_AGENT} | (
        {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    )
    return httpx.Client(
        base_url=base_url,
        headers=headers,
        timeout=httpx.Timeout(
            150, connect=CONNECT
        ),  # `Prefer: wait` holds an answer for up to 120 s
        follow_redirects=False,
        trust_env=False,  # the service is near; a proxy of the environment would see the key
        verify=httpx.create_ssl_context(),
    )


def service_call(client: httpx.Client, method: str, path: str, **options: Any) -> httpx.Response:
    """One request of `service_client`, whatever its status; NotConnected, CallTimedOut,
    ConnectionLost.
    """
    try:
        return client.request(method, path, **options)
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise NotConnected(f"{client.base_url.host}: no connection") from error
    except httpx.TimeoutException as error:
        raise CallTimedOut(f"{client.base_url.host}: no answer in time") from error
    except httpx.HTTPError as error:
        raise ConnectionLost(f"{client.base_url.host}: the connection broke") from error
