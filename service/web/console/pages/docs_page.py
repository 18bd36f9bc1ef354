"""The OpenAPI and the AsyncAPI document as pages. They are rendered once."""

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response


async def openapi_docs(_: Request) -> Response:
    return RedirectResponse("/openapi.json")


async def asyncapi_docs(_: Request) -> Response:
    return RedirectResponse("/asyncapi.json")
