"""The table of everything that waits in memory, with the figures of the code."""

from service.app import REPLAYS
from service.backends import DELIVERIES, REDELIVERIES
from service.blobs.blob_store import CHUNK
from service.db import sqlite
from service.db.paging import PAGE_BYTES
from service.events import tail
from service.net import transport
from service.queue import limiter
from service.tasks import inbox_worker
from service.upstreams.lenient import USUAL_BYTES
from service.web import auth, bodies, key_shares, overload, server, server_protocol
from service.web.list_page import PIECE
from service.web.routes import callback_route, task_routes, upstream_file_routes
from tests.bench.program import markdown

HOOKS = DELIVERIES + REDELIVERIES + overload.MANUAL
KEY_WAITS = "`DARKROOM_KEY_WAITS`"


def size(count: int) -> str:
    unit, name = (1 << 20, "MiB") if count >= 1 << 20 else (1 << 10, "KiB")
    return f"{-(-count // unit)} {name}"


def half(total: int) -> str:
    return f"{total:,}, and at most {-(-total // 2):,} for one owner"


def arriving() -> dict[str, str]:
    of_address, of_key = key_shares.BODIES_OF_ADDRESS, key_shares.BODIES_OF_KEY
    return {
        "connections": f"open files less {server.SPARE_DESCRIPTORS}. The kernel holds up to"
        f" {server.BACKLOG:,} (or `net.core.somaxconn`) that are not accepted yet. Idle ones end"
        f" after {server.KEEP_ALIVE_S} s.",
        "requests that wait to begin": "one for each connection, with at most 256 KiB read",
        "head of a request": f"{size(server_protocol.MAX_HEAD)}, {server_protocol.MAX_HEADERS}"
        f" headers and {server_protocol.HEAD_S:g} s",
        "requests of a connection behind one that is not answered": "those in"
        f" {size(server_protocol.SLICE)}, and up to 512 KiB that are read and not parsed",
        "body of a callback": f"{size(inbox_worker.MAX_BODY)} and {callback_route.BODY_S:g} s",
        "body of a client's request": f"{size(bodies.MAX_BODY)} and {bodies.BODY_S:g} s."
        f" {size(task_routes.MAX_SUBMISSION)} with `data:` URLs,"
        f" {size(upstream_file_routes.MAX_JSON)} with a file in base64. {key_shares.BODIES} that"
        f" are not complete, {of_address} for one address, {of_key} for one key",
        "bytes of all these bodies": f"{size(key_shares.BYTES)},"
        f" {size(key_shares.BYTES_OF_ADDRESS)} for one address, and for one key as many as stay"
        f" free, at most {size(key_shares.BYTES // 2)}",
        "callbacks that commit": f"{overload.MAX_COMMITTING}, and at most"
        f" {2 * overload.BEGIN_PER_TURN} more that began in the same turn",
        "delayed refusals of wrong tokens": f"{overload.MAX_DELAY_S:g} s each, at most"
        f" {callback_route.MAX_DELAYED_BODIES} of them with a long body",
        "requests whose key is looked up": f"{overload.LOOKED_UP:,}, and at most"
        f" {overload.LOOKED_UP // 2:,} for one address",
        "clients' requests": half(overload.MAX_ACTIVE),
    }


def waiting() -> dict[str, str]:
    return {
        "submissions that wait for their task": f"{half(overload.SUBMISSIONS)}, or"
        f" {overload.WAITING_OF_KEY:,} for one key",
        "long polls": f"{half(overload.POLLS)}, or {KEY_WAITS} (100) for one key",
        "streams of events": f"{half(overload.STREAMS)}, or {KEY_WAITS} (100) for one key. They"
        f" share the last {tail.KEPT:,} events or {size(tail.KEPT_SIZE)} of the outbox",
        "a page of a list or of events": f"{size(PAGE_BYTES)}, read a few rows at a time, and sent"
        f" in pieces of {size(PIECE)} that are freed one by one. Those above {size(PIECE)} that"
        f" are on their way: {half(overload.LONG_PAGES)}",
        "an image on its way": size(CHUNK),
        "what readers of all answers leave": f"{size(key_shares.MAX_UNSENT)}, beside what the"
        " kernel holds (`net.ipv4.tcp_mem`)",
        "writes that wait for a commit": "running callbacks + running clients' requests + places of"
        " the workers",
        "reads that wait for a connection": "the same + requests whose key is looked up",
        "readers of the store": f"{sqlite.READERS} threads on SQLite, and at most"
        f" {sqlite.READERS - 1} for one owner",
        "listeners for a task or an event": "waiting clients' requests + streams",
    }


def at_work() -> dict[str, str]:
    owners = transport.LOOKUPS // (transport.LOOKUPS_REST + 1) + 1
    return {
        "jobs of the workers": "the places of each stage: three times `EVOLINK_CONCURRENCY`,"
        f" `DOWNLOAD_CONCURRENCY`, {DELIVERIES} first deliveries and {REDELIVERIES} retries,"
        f" {REPLAYS} replays",
        "calls that wait for a place at the upstream": "places of the workers + running clients'"
        " requests, 10 s each",
        "an answer of the upstream": f"{size(USUAL_BYTES)}. A larger one is on disk. One at a time"
        " is parsed, with one of its images in memory",
        "outgoing connections": f"64. {HOOKS} each for endpoints and tasks' own addresses,"
        " `DOWNLOAD_CONCURRENCY` for results.",
        "name look-ups": f"{transport.LOOKUPS} threads for each purpose, and at most {owners} for"
        " one owner",
        "attempts by hand and test sends": half(overload.MANUAL),
        "subscribers whose limit is remembered": f"{limiter.KNOWN:,}",
        "images that wait for a decoder": "`DOWNLOAD_CONCURRENCY`, on disk, and uploads",
        "API keys in the cache": f"{auth.CACHE_KEYS:,} valid ones, for {auth.CACHE_S:g} s",
        "keys with a request limit (`DARKROOM_KEY_REQUESTS`)": "two numbers for each key, for the"
        " length of its window",
    }


def bounds_table() -> str:
    rows = {**arriving(), **waiting(), **at_work()}
    return markdown(("what", "bound"), rows.items())
