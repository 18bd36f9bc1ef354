"""Templates, the filters that they use, and static files. Every value is escaped."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from typing import Any
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.requests import Request
from starlette.responses import Response

from service.errors import ApiError
from service.web.published import tagged

STEPS = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))
UNITS = ("B", "KB", "MB", "GB", "TB")
TONES: Mapping[str, str] = {
    **dict.fromkeys(("completed", "delivered", "enabled", "ok", "accepted", "done"), "good"),
    **dict.fromkeys(("failed", "dead", "disabled", "unavailable", "revoked"), "bad"),
    **dict.fromkeys(("uncertain", "expired", "paused", "degraded", "conflict"), "warn"),
    **dict.fromkeys(("submitting", "submitted", "storing", "pending", "running"), "busy"),
}


@cache
def environment() -> Environment:
    jinja = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        auto_reload=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.globals |= {"asset": asset_url, "link": link, "tone": tone, "sparkline": sparkline}
    jinja.filters |= {each.__name__: each for each in (ago, moment, size, coded, number, span)}
    return jinja


def link(path: str, query: Mapping[str, Any] | None = None, **changes: Any) -> str:
    """A path with a query. `changes` replace its values, and None removes one."""
    values = {**(query or {}), **changes}
    pairs = {name: value for name, value in values.items() if value not in (None, "")}
    return f"{path}?{urlencode(pairs, doseq=True)}" if pairs else path


def tone(state: str | None) -> str:
    return TONES.get(state or "", "idle")


def as_time(value: str | float) -> datetime:
    """A time as the API writes it: RFC 3339, or seconds since 1970."""
    if isinstance(value, str):
        return datetime.fromisoformat(value)
    return datetime.fromtimestamp(value, UTC)


def moment(value: str | float) -> str:
    return f"{as_time(value):%Y-%m-%d %H:%M:%S}"


def ago(value: str | float, now: datetime) -> str:
    """`3 min ago`, or `in 3 min`."""
    seconds = (now - as_time(value)).total_seconds()
    if abs(seconds) < 1:
        return "now"
    return f"{span(seconds)} ago" if seconds > 0 else f"in {span(-seconds)}"


def span(seconds: float | None) -> str:
    """A time span with one unit. Below a second it has milliseconds."""
    if seconds is None:
        return "–"
    if 0 < seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    unit, name = next((step for step in STEPS if seconds >= step[0]), STEPS[-1])
    return f"{int(seconds // unit)} {name}"


def size(amount: float | None) -> str:
    """A number of bytes, in units of a thousand."""
    if amount is None:
        return "–"
    unit = next((unit for unit in UNITS if amount < 1000 ** (UNITS.index(unit) + 1)), UNITS[-1])
    scaled = amount / 1000 ** UNITS.index(unit)
    return f"{scaled:.1f} {unit}" if unit != "B" and scaled < 100 else f"{scaled:.0f} {unit}"


def number(value: float | None) -> str:
    """With separators between thousands, and a dash for None."""
    if value is None:
        return "–"
    return f"{value:,.6f}".rstrip("0").rstrip(".")


def coded(text: str) -> Markup:
    """The escaped text, with what is between backticks as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704


def sparkline(values: Iterable[float]) -> str:
    """The points of a polyline in an SVG of 120 by 28."""
    heights = list(values)
    most, step = max([*heights, 0]) or 1, 118 / max(1, len(heights) - 1)
    points = enumerate(heights)
    return " ".join(f"{1 + n * step:.1f},{26 - each / most * 24:.1f}" for n, each in points)


# --- style sheets and scripts, under a name that contains their hash ---

TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FOREVER = "public, max-age=31536000, immutable"


@cache
def contents() -> Mapping[str, bytes]:
    """Every file by its name."""
    folder = files(__package__).joinpath("static")
    return {each.name: each.read_bytes() for each in folder.iterdir() if each.name[0] != "."}


@cache
def version() -> str:
    """The hash of all files, because a script imports another of the same version."""
    digest = hashlib.sha256()
    for name, content in sorted(contents().items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def asset_url(name: str) -> str:
    """KeyError: no file has that name."""
    assert contents()[name] is not None
    return f"/assets/{version()}/{name}"


async def asset(request: Request) -> Response:
    """Answers with a file. A page of another version gets this one's, and asks again later."""
    name = request.path_params["name"]
    content = contents().get(name)
    if content is None:
        raise ApiError(404, "not_found", "nothing has that name")
    kept = FOREVER if request.path_params["version"] == version() else "no-cache"
    headers = {"Cache-Control": kept, "X-Content-Type-Options": "nosniff"}
    return tagged(request, content, TYPES[name[name.rfind(".") :]], headers)
