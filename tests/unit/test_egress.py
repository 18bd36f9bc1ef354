"""The guard's decisions about URLs and addresses, without any network."""

import random
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import urlsplit

import httpx
import pytest
import yarl
from hypothesis import given
from hypothesis import strategies as st

from service.errors import EgressRefused, NotConnected
from service.links import MAX_LINK
from service.net.addresses import forbidden
from service.net.egress_client import Egress, Rules
from service.net.urls import parse_url

PUBLIC = (
    "1.1.1.1",
    "93.184.216.34",
    "100.63.255.255",
    "100.128.0.0",
    "172.32.0.1",
    "2606:4700::1111",
    "2a00:1450:4001:81b::200e",
)
PRIVATE = (
    *(
        "0.0.0.0",
        "0.1.2.3",
        "10.0.0.1",
        "100.64.0.1",
        "100.127.255.255",
        "127.0.0.1",
        "127.255.255.254",
        "169.254.169.254",
    ),
    *(
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.1",
        "192.0.0.9",
        "192.0.0.170",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.0.1",
    ),
    *(
        "198.18.0.1",
        "198.19.255.255",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "233.252.0.1",
        "239.255.255.255",
    ),
    *("240.0.0.1", "255.255.255.255", "168.63.129.16"),
    *(
        "::",
        "::1",
        "fc00::1",
        "fd12:3456::1",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "ff02::1",
        "ff0e::1",
        "100::1",
        "5f00::1",
        "4000::1",
    ),
    *(
        "2001:db8::1",
        "3fff::1",
        "2001::1",
        "2001:2::1",
        "2001:10::1",
        "2001:20::1",
        "2606:4700::1%1",
    ),
    *(
        "::ffff:127.0.0.1",
        "::ffff:1.1.1.1",
        "::127.0.0.1",
        "::1.1.1.1",
        "::ffff:0:1.1.1.1",
        "64:ff9b::7f00:1",
        "64:ff9b::101:101",
    ),
    *(
        "64:ff9b:1::1",
        "64:ff9b:1:fffe::a00:1",
        "2002:7f00:1::1",
        "2002:101:101::1",
        "2001:0:7f00:1::1",
        "2606:4700::5efe:a00:1",
    ),
)


@pytest.mark.parametrize("text", PUBLIC)
def test_a_routable_address_may_be_reached_only_with_tls(text: str) -> None:
    """A globally routable address is enough for https and never for plain http."""
    assert forbidden(ip_address(text), (), plain=False) is None
    assert forbidden(ip_address(text), (), plain=True) is not None


@pytest.mark.parametrize("text", PRIVATE)
def test_an_address_that_is_not_routable_is_refused_with_a_reason(text: str) -> None:
    """Every special-purpose address is refused, also one that embeds an IPv4 address. The reason
    names the rule and no address, because a client that gave a name may not know the address.
    """
    reason = forbidden(ip_address(text), (), plain=False)
    assert reason is not None
    assert not set(reason) & set("0123:")


def test_plain_http_is_allowed_only_inside_the_networks() -> None:
    """An address inside the purpose's networks may be reached with and without TLS. An address
    outside stays refused.
    """
    networks = (ip_network("10.1.0.0/16"), ip_network("fd00::/8"), ip_network("93.184.216.0/24"))
    for text in ("10.1.2.3", "fd00::1", "93.184.216.34"):
        assert forbidden(ip_address(text), networks, plain=True) is None
    for text in ("10.2.0.1", "fe80::1", "1.1.1.1"):
        assert forbidden(ip_address(text), networks, plain=True) is not None


@pytest.mark.parametrize("prefix", ["::ffff:0:0/96", "64:ff9b::/96", "2002::/16", "64:ff9b:1::/48"])
def test_a_translating_prefix_does_not_open_the_addresses_behind_it(prefix: str) -> None:
    """The guard checks the embedded IPv4 address also if the prefix is one of the networks."""
    network = ip_network(prefix)
    shift = 80 if prefix.startswith("2002") else 0

    def inside(text: str) -> IPv6Address:
        return IPv6Address(int(network.network_address) | int(IPv4Address(text)) << shift)

    assert forbidden(inside("10.0.0.1"), (network,), plain=False) is not None
    assert forbidden(inside("1.1.1.1"), (network,), plain=False) is None
    assert forbidden(inside("10.0.0.1"), (network, ip_network("10.0.0.0/8")), plain=True) is None


def test_loopback_of_both_families_can_be_opened() -> None:
    """`::1` embeds no IPv4 address. It is in the networks or not."""
    assert forbidden(ip_address("::1"), (ip_network("::1/128"),), plain=True) is None
    assert forbidden(ip_address("127.0.0.1"), (ip_network("127.0.0.0/8"),), plain=True) is None


@pytest.mark.parametrize("seed", range(5))
def test_no_address_of_a_private_network_passes(seed: int) -> None:
    """Any address of a private range is refused, bare and inside each translating prefix."""
    dice = random.Random(seed)
    for text in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "224.0.0.0/3",
    ):
        network = ip_network(text)
        address = network[dice.randrange(network.num_addresses)]
        assert forbidden(address, (), plain=False) is not None
        for prefix in ("::ffff:0:0", "64:ff9b::", "2606:4700::5efe:0:0"):
            assert (
                forbidden(IPv6Address(int(IPv6Address(prefix)) | int(address)), (), plain=False)
                is not None
            )


# --- URLs
# --------------------------------------------------------------------------------------------------

UNFIT = (
    *(
        "",
        "x",
        "//a.test/",
        "http:a.test",
        "http:/a.test",
        "https:///x",
        "https://",
        "https://:443/",
        "https://?a",
        "https://#a",
    ),
    *(
        "ftp://a.test/",
        "file:///etc/passwd",
        "gopher://a.test/",
        "javascript:alert(1)",
        "data:,x",
        "unix:///run/x",
    ),
    *(
        "https://u@a.test/",
        "https://u:p@a.test/",
        "https://@a.test/",
        "https://a.test@127.0.0.1/",
        "https://a%40b.test/",
    ),
    *(
        "https://a.test:0/",
        "https://a.test:65536/",
        "https://a.test:/",
        "https://a.test:x/",
        "https://a.test:-1/",
        "https://a.test:８０/",
    ),
    *("https://a.test:443:80/", "https://a.test:100000/", "https://a.test: 80/"),
    *(
        "https://a.test:22/",
        "https://a.test:25/",
        "http://1.1.1.1:0025/",
        "https://a.test:6667/",
        "https://[::1]:587/",
    ),
    *("https://a.test/\x00x", "https://a.test/\x1fx", "https://a.test/\x7f", "https://a.test/\x85"),
    *(
        "https://a.test/\u2028",
        "https://a.test/\ud800",
        "https://a.test\\@b.test/",
        "https://a.test\\b/",
        "https://a test/",
        "https://a.test%2f/",
    ),
    *(
        "https://a..test/",
        "https://.a.test/",
        "https://a.test../",
        "https://-a.test/",
        "https://a-.test/",
        "https://*.test/",
        "https://a,b.test/",
    ),
    *(f"https://{'a' * 64}.test/", f"https://{'a.' * 127}test/", "https://a.test/" + "x" * 2034),
    *(
        "https://2130706433/",
        "https://0x7f000001/",
        "https://0x7f.1/",
        "https://0177.0.0.1/",
        "https://127.1/",
        "https://127.0.1/",
    ),
    *(
        "https://017700000001/",
        "https://127.0.0.01/",
        "https://127.0.0.0x1/",
        "https://0x/",
        "https://256.1.1.1/",
        "https://1.1.1.1.1/",
    ),
    *(
        "https://127.0.0.1../",
        "https://1.1.1/",
        "https://a.1/",
        "https://a.0x1f/",
        "https://09.1.1.1/",
        "https://１２７.0.0.1/",
        "https://①②⑦.0.0.1/",
    ),
    *(
        "https://ａ.test/",
        "https://a\u00ad.test/",
        "https://\u200ba.test/",
        "https://[::1%25lo]/",
        "https://[fe80::1%eth0]/",
    ),
    *(
        "https://[::1/",
        "https://::1/",
        "https://[::1]x/",
        "https://[]/",
        "https://[1.1.1.1]/",
        "https://[v1.a]/",
        "https://[::1]:0/",
        "https://[:::]/",
    ),
)


@pytest.mark.parametrize("url", UNFIT)
def test_an_ambiguous_url_is_refused(url: str) -> None:
    """A text that is no plain http or https URL, or that two parsers could read differently, is
    refused with a reason.
    """
    with pytest.raises(ValueError, match=r"^(a|the|only) "):
        parse_url(url)
    refused: list[tuple[str, str, str]] = []
    egress = Egress(Rules("results", upgrade=True), on_refused=lambda *what: refused.append(what))
    with pytest.raises(EgressRefused):
        egress.check_url(url)
    assert [what[0] for what in refused] == ["results"]


@pytest.mark.parametrize(
    ("url", "host", "port", "normal"),
    [
        ("https://A.Test", "a.test", None, "https://a.test"),
        ("HTTPS://a.test./x", "a.test", None, "https://a.test/x"),
        ("https://a.test:8443/x#part", "a.test", 8443, "https://a.test:8443/x"),
        (
            "https://a.test/%7E%2F?s=a%2Fb%20c+%3D",
            "a.test",
            None,
            "https://a.test/%7E%2F?s=a%2Fb%20c+%3D",
        ),
        ("https://a_b-c.test/ü x", "a_b-c.test", None, "https://a_b-c.test/%C3%BC%20x"),
        ("https://bücher.test/", "xn--bcher-kva.test", None, "https://xn--bcher-kva.test/"),
        ("https://图.test/", "xn--wcs.test", None, "https://xn--wcs.test/"),
        ("https://1.1.1.1./", "1.1.1.1", None, "https://1.1.1.1/"),
        ("https://[2606:4700:0::1111]:8/", "2606:4700::1111", 8, "https://[2606:4700::1111]:8/"),
        ("http://localhost", "localhost", None, "http://localhost"),
    ],
)
def test_a_url_is_brought_to_one_form(url: str, host: str, port: int | None, normal: str) -> None:
    """The host is ASCII, in lower case, without its last dot. Path and query stay as they are."""
    target = parse_url(url)
    assert (target.host, target.port) == (host, port)
    assert target.url.removesuffix("/") == normal.removesuffix("/")


@given(
    st.sampled_from(["http://", "https://", "HTTPS://"]),
    st.sampled_from(["", "a.b", "1.1.1.1", "[::1]", "[::1]:8"]),
    st.text(
        "ab.:/@[]?#%\\ 0127xX-_é。１ßı\u0130\u200d\xad;&=+|^`{}<>\"'~*,!$()你\U0001f600",
        max_size=12,
    ),
)
def test_all_parsers_read_an_accepted_url_alike(scheme: str, begin: str, rest: str) -> None:
    """The guard, httpx, aiohttp's yarl and the standard library read the same host, port and path
    in every accepted URL.
    """
    try:
        target = parse_url(scheme + begin + rest)
    except ValueError:
        return
    by_httpx, by_yarl, by_urllib = (
        httpx.URL(target.url),
        yarl.URL(target.url, encoded=True),
        urlsplit(target.url),
    )
    assert {by_httpx.raw_host.decode(), by_yarl.raw_host, by_urllib.hostname} == {target.host}
    assert {by_yarl.port, by_urllib.port or by_yarl.port} == {target.origin[2]}
    assert by_yarl.raw_path_qs.rstrip("?") == by_httpx.raw_path.decode().rstrip("?")
    assert not by_httpx.userinfo


def test_a_full_stop_of_another_script_hides_no_address() -> None:
    """An ideographic full stop separates labels. The host is the address that it spells, and the
    guard checks that address.
    """
    assert parse_url("https://127。0。0。1/").address == ip_address("127.0.0.1")
    with pytest.raises(EgressRefused, match="not globally routable"):
        Egress(Rules("endpoints")).check_url("https://127。0。0。1/")


@pytest.mark.parametrize("text", [address for address in PRIVATE if "%" not in address])
def test_a_literal_address_is_checked_in_the_url(text: str) -> None:
    """The guard checks it before it resolves or connects."""
    host = f"[{text}]" if ":" in text else text
    with pytest.raises(EgressRefused, match="not globally routable"):
        Egress(Rules("endpoints")).check_url(f"https://{host}/")


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("files.x.test", True),
        ("a.b.x.test", True),
        ("FILES.X.TEST.", True),
        ("x.test", False),
        ("notx.test", False),
        ("files.x.test.evil.test", False),
        ("y.test", True),
        ("a.y.test", False),
        ("1.1.1.1", False),
        ("8.8.8.8", True),
    ],
)
def test_only_listed_hosts_are_allowed(host: str, allowed: bool) -> None:
    """`.x` is every subdomain of x without x, and `x` is exactly x. A literal address must be
    listed too.
    """
    egress = Egress(Rules("results", hosts=(".x.test", "y.test", "8.8.8.8")))
    if allowed:
        egress.check_url(f"https://{host}/")
    else:
        with pytest.raises(EgressRefused, match="not one of those allowed"):
            egress.check_url(f"https://{host}/")


def test_plain_http_needs_networks_or_an_upgrade() -> None:
    """Without both, an http URL is refused. With networks, a literal address must be inside them.
    With an upgrade, the URL counts as https.
    """
    inside = (ip_network("10.0.0.0/8"),)
    with pytest.raises(EgressRefused, match="plain http"):
        Egress(Rules("endpoints")).check_url("http://a.test/")
    with pytest.raises(EgressRefused, match="plain http"):
        Egress(Rules("endpoints", networks=inside)).check_url("http://1.1.1.1/")
    Egress(Rules("endpoints", networks=inside)).check_url("http://10.0.0.1/")
    Egress(Rules("results", networks=inside, upgrade=True)).check_url("http://1.1.1.1/")
    with pytest.raises(EgressRefused, match="not globally routable"):
        Egress(Rules("results", networks=inside, upgrade=True)).check_url("http://192.168.0.1/")


def test_an_upgrade_drops_port_80() -> None:
    """Any other port stays."""
    assert parse_url("http://a.test:80/x").upgraded.url == "https://a.test/x"
    assert parse_url("http://a.test:8080/x").upgraded.url == "https://a.test:8080/x"


# --- names
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("addresses", "refused"),
    [
        (["1.1.1.1", "2606:4700::1111"], False),
        (["1.1.1.1", "10.0.0.1"], True),
        (["127.0.0.1"], True),
        (["2606:4700::1111", "::ffff:127.0.0.1"], True),
        (["1.1.1.1", "fe80::1%eth0"], True),
    ],
)
async def test_every_address_of_a_name_is_checked(addresses: Sequence[str], refused: bool) -> None:
    """One forbidden address among several refuses the name. The refusal is reported once."""
    reported: list[tuple[str, str, str]] = []

    async def resolve(_: str) -> Sequence[str]:
        return addresses

    egress = Egress(
        Rules("endpoints"), resolve=resolve, on_refused=lambda *what: reported.append(what)
    )
    if refused:
        with pytest.raises(EgressRefused):
            await egress.check("https://a.test/")
    else:
        await egress.check("https://a.test/")
    assert [what[:2] for what in reported] == [("endpoints", "a.test")] * refused


async def test_a_name_may_use_plain_http_only_with_all_addresses_in_the_networks() -> None:
    """With `upgrade`, a name outside the networks counts as https."""
    known = {
        "in.test": ["10.0.0.1"],
        "both.test": ["10.0.0.1", "1.1.1.1"],
        "out.test": ["1.1.1.1"],
        "bad.test": ["192.168.0.1"],
    }

    async def resolve(host: str) -> Sequence[str]:
        return known[host]

    networks = (ip_network("10.0.0.0/8"),)
    strict = Egress(Rules("endpoints", networks=networks), resolve=resolve)
    await strict.check("http://in.test/")
    for host in ("both.test", "out.test", "bad.test"):
        with pytest.raises(EgressRefused):
            await strict.check(f"http://{host}/")
    lenient = Egress(Rules("results", networks=networks, upgrade=True), resolve=resolve)
    for host in ("in.test", "both.test", "out.test"):
        await lenient.check(f"http://{host}/")
    with pytest.raises(EgressRefused):
        await lenient.check("http://bad.test/")


async def test_an_http_link_counts_as_https_with_an_upgrade_and_no_networks() -> None:
    """Plain http is then never used, so a public name or address passes."""

    async def resolve(_: str) -> Sequence[str]:
        return ["1.1.1.1"]

    egress = Egress(Rules("results", upgrade=True), resolve=resolve)
    await egress.check("http://a.test/")
    await egress.check("http://1.1.1.1/")


@pytest.mark.parametrize(("count", "refused"), [(64, False), (65, True), (5000, True)])
async def test_a_name_with_very_many_addresses_is_refused(count: int, refused: bool) -> None:
    """The guard checks all addresses, so their number is limited. It tries only the first few that
    pass.
    """

    async def resolve(_: str) -> Sequence[str]:
        return [str(IPv4Address("8.0.0.0") + number) for number in range(count)]

    egress = Egress(Rules("endpoints"), resolve=resolve)
    if refused:
        with pytest.raises(EgressRefused, match="more than 64 addresses"):
            await egress.check("https://a.test/")
    else:
        assert len(await egress._allowed_addresses("a.test", plain=False)) == 8


async def test_the_last_of_many_addresses_is_checked() -> None:
    """An address that would never be tried refuses the name too."""

    async def resolve(_: str) -> Sequence[str]:
        return [*(f"8.0.0.{number}" for number in range(63)), "10.0.0.1"]

    with pytest.raises(EgressRefused, match="its address is not globally routable"):
        await Egress(Rules("endpoints"), resolve=resolve).check("https://a.test/")


def test_each_purpose_has_its_own_limit_of_a_urls_length() -> None:
    """It is 2048 characters for an endpoint or a callback_url. A result's link may be longer,
    because it may contain a session's token.
    """
    results = Egress(Rules("results", max_url=MAX_LINK))
    url = "https://a.test/".ljust(MAX_LINK, "x")
    results.check_url(url)
    with pytest.raises(EgressRefused, match="2048"):
        Egress(Rules("endpoints")).check_url(url)
    # Each character has three bytes, and nine when it is percent-encoded.
    results.check_url("https://a.test/" + "雪" * 5456)
    with pytest.raises(EgressRefused, match="16384 bytes"):
        results.check_url("https://a.test/" + "雪" * 5457)


@pytest.mark.parametrize(
    "text",
    [
        " https://a.test/x",
        "https://a.test/x\n",
        "\t\r\n https://a.test/x\x00\x1f ",
        "https://a\t.test/x",
        "ht\ntps://a.test\r/x",
    ],
)
def test_a_url_is_trimmed_as_browsers_do(text: str) -> None:
    """The WHATWG URL standard removes C0 controls and blanks around a URL, and tabs and line ends
    everywhere (section 4.4). Nothing else of it is repaired.
    """
    assert parse_url(text).url == "https://a.test/x"
    assert parse_url(" \t/x\n", "https://a.test/y").url == "https://a.test/x"


@pytest.mark.parametrize("answer", [[], OSError("no such name")])
async def test_a_name_without_addresses_is_not_connected(answer: list[str] | OSError) -> None:
    """A missing address is no refusal. The other side may be back later."""

    async def resolve(_: str) -> Sequence[str]:
        if isinstance(answer, OSError):
            raise answer
        return answer

    with pytest.raises(NotConnected, match=r"a\.test: no address"):
        await Egress(Rules("endpoints"), resolve=resolve).check("https://a.test/")


async def test_the_operating_systems_resolver_is_the_default() -> None:
    """Its answers are checked too."""
    await Egress(
        Rules("sandbox", networks=(ip_network("127.0.0.0/8"), ip_network("::1/128")))
    ).check("http://localhost/")
    with pytest.raises(EgressRefused):
        await Egress(Rules("endpoints")).check("https://localhost/")
