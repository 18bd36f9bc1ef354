"""Parsing of URLs that leaves no room for a difference between two parsers."""

import re
import unicodedata
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from urllib.parse import urljoin

import httpx

from service.links import MAX_LINK, trimmed
from service.net.addresses import Address

MAX_URL = 2048  # characters, the upstream's limit for a callback_url
URL = re.compile(r"(https?)://([^/?#]*)([^#]*)(?:#.*)?", re.IGNORECASE | re.DOTALL)
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]")  # also surrogates
SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE | re.ASCII)
# The Fetch standard's bad ports (section 2.9). A server of another protocol there might act on
# parts of a request. Ports 1 and 9 are left out: they have no server, and serve as addresses that
# are meant never to answer.
_BAD_PORTS = """
7 11 13 15 17 19 20 21 22 23 25 37 42 43 53 69 77 79 87 95 101 102 103 104 109 110 111 113 115
117 119 123 135 137 139 143 161 179 389 427 465 512 513 514 515 526 530 531 532 540 548 554 556
563 587 601 636 989 990 993 995 1719 1720 1723 2049 3659 4045 4190 5060 5061 6000 6566 6665 6666
6667 6668 6669 6679 6697 10080
"""
BAD_PORTS = frozenset(int(port) for port in _BAD_PORTS.split())
AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::([0-9]{1,5}))?", re.IGNORECASE | re.ASCII)
LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)
# A host with a last label that matches is an IPv4 address (WHATWG URL).
NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)


class OddAddress(ValueError):
    """The host is a literal address, written so that two parsers might read two addresses."""


@dataclass(frozen=True)
class Target:
    """A parsed URL. `host` is ASCII, in lower case, without brackets and without a last dot.
    `address` is set when the host is a literal address.
    """

    scheme: str
    host: str
    port: int | None
    path: str
    address: Address | None

    @cached_property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port is None else f":{self.port}"
        return str(httpx.URL(f"{self.scheme}://{host}{port}{self.path}"))

    @property
    def upgraded(self) -> "Target":
        return replace(self, scheme="https", port=None if self.port == 80 else self.port)

    @property
    def origin(self) -> tuple[str, str, int]:
        return self.scheme, self.host, self.port or (443 if self.scheme == "https" else 80)


@lru_cache(512)  # webhooks go to few URLs
def parse_url(text: str, base: str = "", longest: int = MAX_URL) -> Target:
    """Parses a URL, relative to `base`, as browsers trim it. Raises ValueError with the reason for
    everything that two parsers might read differently. `longest` is in characters.
    """
    text = trimmed(text)
    if CONTROL.search(text):
        raise ValueError("a URL has no control characters")
    # `urljoin` alone would read `http:///x` as a path
    url = text if not base or SCHEME.match(text) else urljoin(base, text)
    if len(url) > longest:
        raise ValueError(f"a URL has at most {longest} characters")
    if len(url.encode()) > MAX_LINK:  # percent-encoded it has up to three times as many
        raise ValueError(f"a URL has at most {MAX_LINK} bytes")
    if (parts := URL.fullmatch(url)) is None:
        raise ValueError("only http and https URLs are fetched")
    scheme, authority, path = parts[1].lower(), parts[2], parts[3]
    if "@" in authority:
        raise ValueError("a URL has no user name or password")
    if (match := AUTHORITY.fullmatch(authority)) is None:
        raise ValueError("the host or port of the URL is not valid")
    port = None if match[2] is None else int(match[2])
    if port is not None and not 0 < port < 65536:
        raise ValueError("the port of the URL is not valid")
    if port in BAD_PORTS:
        raise ValueError("the port of the URL is another protocol's")
    host, address = parse_host(match[1])
    return Target(scheme, host, port, path, address)


def parse_host(text: str) -> tuple[str, Address | None]:
    """A URL's host as ASCII, and its address if it is a literal. Raises ValueError for every
    notation of an address except the plain one.
    """
    if text.startswith("["):
        try:
            literal = IPv6Address(text[1:-1])
        except AddressValueError as error:
            raise ValueError(f"the host {text} of the URL is not valid") from error
        return str(literal), literal
    host = text
    if not host.isascii():
        if unicodedata.normalize("NFKC", host) != host:  # full-width digits, for example
            raise ValueError(f"the host {text} of the URL is not in normal form")
        try:
            host = httpx.URL(f"https://{host}/").raw_host.decode("ascii")
        except httpx.InvalidURL as error:
            raise ValueError(f"the host {text} of the URL is not valid") from error
    host = host.lower().removesuffix(".")
    labels = host.split(".")
    if NUMBER.fullmatch(labels[-1]):
        try:
            return host, IPv4Address(host)
        except AddressValueError as error:
            message = f"the host {text} of the URL is an address in an odd notation"
            raise OddAddress(message) from error
    if len(host) > 253 or not all(is_label(label) for label in labels):
        raise ValueError(f"the host {text} of the URL is not valid")
    return host, None


def is_label(text: str) -> bool:
    """Whether the text is a label of a host name. `xn--…` must decode (RFC 5891, section 5.4),
    because httpx decodes it and raises an error.
    """
    if not LABEL.fullmatch(text):
        return False
    try:
        return httpx.URL(f"https://{text}/").host != ""
    except (httpx.InvalidURL, UnicodeError):
        return False
