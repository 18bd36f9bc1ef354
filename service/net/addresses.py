"""The addresses that the service may connect to."""

from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# All that IANA allocates as global unicast: no ULA, link-local, site-local, multicast or NAT64.
GLOBAL_V6 = IPv6Network("2000::/3")
# IANA's special-purpose registries where `is_global` of some Python releases is wrong, and the
# host agent that every Azure machine reaches at a global-looking address
_SPECIAL = """
0.0.0.0/8 100.64.0.0/10 192.0.0.0/24 192.88.99.0/24 198.18.0.0/15 224.0.0.0/4 240.0.0.0/4
2001::/23 2001:db8::/32 2002::/16 3fff::/20 168.63.129.16/32
"""
SPECIAL = tuple(ip_network(text) for text in _SPECIAL.split())
# SIIT and NAT64
TRANSLATED = tuple(
    ip_network(text)
    for text in ("::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48")
)


def embedded(address: IPv6Address) -> Iterator[IPv4Address]:
    """The IPv4 addresses that a gateway, tunnel or kernel may extract from an IPv6 address."""
    number = int(address)
    compatible = 1 < number < 1 << 32  # ::/96 but for the unspecified address and loopback
    isatap = number >> 32 & 0xFCFFFFFF == 0x00005EFE  # the interface half, without its u and g bits
    if compatible or isatap or any(address in network for network in TRANSLATED):
        yield IPv4Address(number & 0xFFFFFFFF)
    if address.sixtofour:
        yield address.sixtofour
    if address.teredo:
        yield from address.teredo


def forbidden(address: Address, networks: Sequence[Network], *, plain: bool) -> str | None:
    """The rule by which the service may not connect to an address (`plain`: without TLS), or None.

    The text does not contain the address, which the caller may not know. The same rule applies
    first to each embedded IPv4 address.
    """
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            return "has a zone"
        for inner in embedded(address):
            if (rule := forbidden(inner, networks, plain=plain)) is not None:
                return f"stands for an IPv4 address that {rule}"
    if any(address in network for network in networks):
        return None
    routable = (
        address.is_global
        and not address.is_multicast
        and not any(address in network for network in SPECIAL)
    )
    if not routable or (address.version == 6 and address not in GLOBAL_V6):
        return "is not globally routable"
    return "is not in the networks that plain http may reach" if plain else None
