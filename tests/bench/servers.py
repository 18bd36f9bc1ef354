"""The servers of a measurement besides `darkroom serve`, each in a process: `python -m
tests.bench.servers bare|bare-submissions|web|upstream|receiver|sandbox`.

Each prints `{"address": …}`, `web` through its `service.started`, and runs until SIGTERM on the
service's own uvicorn settings.
"""

import io
import json
import sys
import time
import zlib
from collections.abc import Callable, Coroutine, Mapping
from decimal import Decimal
from ipaddress import ip_network
from typing import Any
from unittest.mock import patch

import uvloop
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.app import Role, serve
from service.ops import logging
from service.settings import load_settings
from service.upstreams.sandbox import SandboxOptions, create_sandbox, emulator
from service.upstreams.sandbox.renderer import draw
from service.web.overload import PriorityGate
from service.web.server import Server, bind, listening, stopping

HOST = "127.0.0.1"
# By the prompt of the task, as arguments of `picture`.
PICTURES: Mapping[str, Mapping[str, int]] = {"100 KB": {}, "1 MB": {"side": 1440, "quality": 98}}


async def bare(request: Request) -> Response:
    """The least cost of a callback in the framework: it reads the body and stores nothing."""
    await request.body()
    return Response(b'{"status":"accepted"}', media_type="application/json")


async def bare_submission(request: Request) -> Response:
    """The same of a submission, whose JSON it reads."""
    await request.json()
    return Response(b'{"status":"pending"}', media_type="application/json")


BARE = Starlette(routes=[Route("/callbacks/{upstream}/{task_id}/{token}", bare, methods=["POST"])])
BARE_SUBMISSIONS = Starlette(
    routes=[Route("/v1/images/generations", bare_submission, methods=["POST"])]
)


class OpenGate(PriorityGate):
    """Lets every request begin at once. The gate of clients' requests is a cost of Darkroom's."""

    def admit(self, begin: Callable[[], None], *, callback: bool) -> bool:
        return True


def upstream() -> Starlette:
    """An upstream that costs next to nothing. Every queried task is completed, and every result is
    one small image.
    """
    picture = draw("bench/0", "bench", 64, 64, "jpeg")

    async def task(request: Request) -> Response:
        id = request.path_params["task_id"]
        link = f"{request.base_url}files/{id.removeprefix('upstream-')}.jpeg"
        return JSONResponse({"id": id, "status": "completed", "results": [link], "progress": 100})

    async def file(_: Request) -> Response:
        return Response(picture, media_type="image/jpeg")

    return Starlette(routes=[Route("/v1/tasks/{task_id}", task), Route("/files/{name:path}", file)])


def receiver() -> Starlette:
    """Answers each webhook with 204 at once. `/bench/count` has their number. `DELETE /bench/seen`
    has them all, and forgets them: `[time of the monotonic clock, CPU of the process so far, path,
    id, CRC-32 of the body]`.
    """
    came: list[tuple[float, float, str, str, int]] = []

    async def take(request: Request) -> Response:
        now, cpu, body = time.monotonic(), time.process_time(), await request.body()
        path, id = request.scope["path"], request.headers["webhook-id"]
        came.append((now, cpu, path, id, zlib.crc32(body)))
        return Response(status_code=204)

    async def count(_: Request) -> Response:
        return JSONResponse(len(came))

    async def seen(_: Request) -> Response:
        answer = JSONResponse(came)
        came.clear()
        return answer

    return Starlette(
        routes=[
            Route("/{endpoint:int}", take, methods=["POST"]),
            Route("/bench/count", count),
            Route("/bench/seen", seen, methods=["DELETE"]),
        ]
    )


def picture(side: int = 1024, quality: int = 75) -> bytes:
    """A square JPEG with noise. By default it has about 100 KB."""
    base = Image.linear_gradient("L").resize((side, side))
    made = io.BytesIO()
    noisy = Image.blend(base, Image.effect_noise((side, side), 12), 0.4)
    noisy.convert("RGB").save(made, "JPEG", quality=quality)
    return made.getvalue()


def sandbox() -> ASGIApp:
    """The sandbox, timed. A prompt that names a picture gets that one, and any other is drawn."""
    pictures = {name: picture(**how) for name, how in PICTURES.items()}

    def drawn(name: str, prompt: str, width: int, height: int, format: str) -> bytes:
        return pictures.get(prompt) or draw(name, prompt, width, height, format)

    patch.object(emulator, "draw", drawn).start()
    networks = (ip_network("127.0.0.0/8"),)
    return Timed(create_sandbox(SandboxOptions(networks=networks, credits=Decimal(1_000_000))))


class Timed:
    """The sandbox, which also reports at `/bench/times` when it worked on each task's queries and
    results: `{upstream id: [[from, to], …]}`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.times: dict[str, list[tuple[float, float]]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path == "/bench/times":
            await JSONResponse(self.times)(scope, receive, send)
            return
        started = time.time()

        async def sent(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.body" and path.startswith(
                ("/v1/tasks/", "/files/")
            ):
                self.times.setdefault(
                    path.split("/")[-1 if path.startswith("/v1/") else 2], []
                ).append((started, time.time()))

        await self.app(scope, receive, sent)


async def answer(app: ASGIApp, gate: PriorityGate | None = None) -> None:
    bound = bind(HOST, 0)
    with stopping() as stop:
        async with listening(Server(app, bound, 1, gate), stop):
            sys.stdout.write(
                json.dumps({"address": f"http://{HOST}:{bound.getsockname()[1]}"}) + "\n"
            )
            sys.stdout.flush()
            await stop.wait()


async def web() -> None:
    """Runs the service without its workers. On SQLite the program refuses that mode, because no
    other process could do the work. This benchmark needs no workers.
    """
    bound = bind(HOST, 0)
    settings = load_settings(port=bound.getsockname()[1])
    logging.configure(settings.log_format, settings.log_level)
    with stopping() as stop:
        await serve(settings, Role(workers=False), bound, stop)


SERVERS: Mapping[str, Callable[[], Coroutine[Any, Any, None]]] = {
    "bare": lambda: answer(BARE),
    "bare-submissions": lambda: answer(BARE_SUBMISSIONS, OpenGate()),
    "web": web,
    "upstream": lambda: answer(upstream()),
    "receiver": lambda: answer(receiver()),
    "sandbox": lambda: answer(sandbox()),
}

if __name__ == "__main__":
    uvloop.run(SERVERS[sys.argv[1]]())
