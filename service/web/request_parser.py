"""The parser of requests: httptools, with offers to upgrade the connection left out."""

from typing import TYPE_CHECKING

import httptools

if TYPE_CHECKING:
    from service.web.server_protocol import BoundedProtocol


class RequestParser(httptools.HttpRequestParser):
    """Reads a request that offers to upgrade the connection as one without the offer (RFC 9110,
    7.8). Java's HttpClient offers h2c with every plain request.

    httptools treats what follows the head of such a request as another protocol and drops the body.
    So the parser gets the head again without `Upgrade`, and then what follows.
    """

    def __init__(self, protocol: "BoundedProtocol") -> None:
        super().__init__(protocol)
        self._protocol = protocol

    def feed_data(self, data: bytes | memoryview) -> None:  # type: ignore[override] # of uvicorn
        rest = memoryview(data)
        while True:
            try:
                super().feed_data(rest)
            except httptools.HttpParserUpgrade as offer:
                if self.get_method() == b"CONNECT":
                    raise httptools.HttpParserError("a tunnel is no request") from None
                super().feed_data(self._protocol.head_without_offer())
                rest = rest[offer.args[0] :]
            else:
                return
