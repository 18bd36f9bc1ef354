"""Style sheets and scripts, served as bytes under a name that contains their hash."""

import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

from service.errors import ApiError
from service.web.published import tagged

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
