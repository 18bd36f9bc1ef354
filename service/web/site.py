"""The routes of a web process: the API's at once, those of the pages at the first request for one.

The pages need Jinja and twenty modules. A start without them is 50 ms quicker.
"""

import asyncio
import re
from importlib import import_module

from starlette.routing import BaseRoute, Match, Router
from starlette.types import Receive, Scope, Send

from service.web.context import Context
from service.web.routes.table import routes

PAGES = re.compile(r"/(docs|assets|console)(/|\Z)")
MODULE = "service.web.console.console_table"


class PageRoutes(BaseRoute):
    """Routes all paths of the pages to a router of their own. `console`: with the console."""

    def __init__(self, *, console: bool) -> None:
        self._console = console
        self._router: Router | None = None

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        ours = scope["type"] == "http" and PAGES.match(scope["path"])
        return (Match.FULL if ours else Match.NONE), {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._router is None:
            module = await asyncio.to_thread(import_module, MODULE)
            if self._router is None:
                pages = module.page_routes(console=self._console)
                self._router = Router(pages, redirect_slashes=False)
        await self._router(scope, receive, send)


def site_routes(context: Context) -> list[BaseRoute]:
    """All routes of a web process, with the console unless it is off."""
    return [*routes(), PageRoutes(console=context.access.sessions is not None)]
