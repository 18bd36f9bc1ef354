"""The OpenAPI and the AsyncAPI document as pages. They are rendered once."""

import json
import re
from functools import cache

from starlette.requests import Request
from starlette.responses import Response

from service.strict_json import JSON
from service.web.asyncapi import document as asyncapi_document
from service.web.console.templating import environment
from service.web.context import context_of
from service.web.openapi import document as openapi_document
from service.web.published import tagged
from service.web.routes.table import SPECS

API, SCHEMAS, EVENTS = "/docs", "/docs/schemas", "/docs/events"
TEMPLATES = {API: "docs_api.html", SCHEMAS: "docs_schemas.html", EVENTS: "docs_events.html"}
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


async def documentation(request: Request) -> Response:
    console = context_of(request).access.sessions is not None
    page = rendered(request.url.path.rstrip("/"), console=console)
    return tagged(request, page, "text/html", HEADERS)


@cache
def rendered(path: str, *, console: bool) -> bytes:
    document = asyncapi_document() if path == EVENTS else openapi_document(SPECS)
    values = {
        "here": path,
        "console": console,
        "document": document,
        "schemas": document["components"]["schemas"],
        "schema_page": SCHEMAS if path == API else "",
        "groups": groups(document.get("paths", {})),
        "type_of": type_of,
        "rows_of": rows_of,
    }
    text = environment().get_template(TEMPLATES[path]).render(values)
    return re.sub(r"\s*\n\s*", "\n", text).encode()


def groups(paths: JSON) -> dict[str, list[JSON]]:
    """The operations by the first word of their paths behind the version."""
    lists: dict[str, list[JSON]] = {}
    for path, methods in paths.items():
        words = [word for word in path.split("/") if word and word not in ("v1", "api")]
        name = words[0].removesuffix(".json") if words else path
        for method, operation in methods.items():
            lists.setdefault(name, []).append({"path": path, "method": method.upper(), **operation})
    return lists


def rows_of(schema: JSON) -> list[JSON]:
    required = schema.get("required", ())
    fields = schema.get("properties", {})
    return [{"name": name, "required": name in required, **each} for name, each in fields.items()]


def type_of(schema: JSON) -> list[tuple[str, str | None]]:
    """The type of a schema as texts, of which some name another schema."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return [(name, name)]
    if "const" in schema:
        return [(json.dumps(schema["const"]), None)]
    if "enum" in schema:
        return [(" | ".join(map(json.dumps, schema["enum"])), None)]
    for word in ("anyOf", "oneOf", "allOf"):
        if word in schema:
            parts = [type_of(each) for each in schema[word]]
            return [text for part in parts for text in ((" | ", None), *part)][1:]
    if schema.get("type") == "array":
        return [("array of ", None), *type_of(schema.get("items", {}))]
    if isinstance(schema.get("additionalProperties"), dict):
        return [("object of ", None), *type_of(schema["additionalProperties"])]
    return [(str(schema.get("type", "any")), None)]
