"""Every line of the log: its name and its fields beyond those that any line may have. A test holds
this list and the code together.
"""

from collections.abc import Mapping
from types import MappingProxyType

ALWAYS = ("timestamp", "level", "event", "service", "version")
WHERE_KNOWN = (
    *(
        "request_id",
        "owner",
        "task_id",
        "upstream_id",
        "callback_id",
        "event_id",
        "delivery_id",
        "endpoint_id",
        "trace_id",
    ),
    "exception",
)
LINES: Mapping[str, str] = MappingProxyType(
    {
        "service.started": "`role`, `address`, `settings` (secrets masked)",
        "service.stopped": "`role`, `unfinished` (work given back)",
        "http.request": "`method`, `route`, `status`, `duration_ms`, `bytes`",
        "http.shed": (
            "`busy`, `waiting`, `callbacks` (in hand), `withheld` (requests shed since"
            " the last line): answered 503"
        ),
        "http.failed": "`method`, `route`, `exception`: a defect of ours, answered 500",
        "auth.refused": "`reason`, `hint` (the first characters of what looks like a key of ours)",
        "admin.action": "`action`, `subject`",
        "task.queued": "`model`, `replayed`, `prompt` (with `LOG_PROMPTS`)",
        "task.submitted": "`attempt`, `estimated_time`, `state` (after it)",
        "task.submission_retried": "`attempt`, `reason`, `account`, `wait_s`",
        "task.submission_refused": "`status`, `code`",
        "task.submission_uncertain": "`reason`, `decide_s`",
        "account.refused": (
            "`reason`: the upstream takes our key or account no more; nothing is"
            " submitted until it does"
        ),
        "account.restored": "`seconds` (since it was refused): what waited is sent",
        "upstream.called": "`kind`, `status`, `outcome`, `duration_ms`, `upstream_request_id`",
        "callback.received": "`verdict`, `status`, `bytes`, `duration_ms`",
        "callback.refused": (
            "`reason`, `duration_ms`, `withheld` (wrong tokens since the last"
            " line, in a flood): nothing was kept"
        ),
        "callback.overloaded": (
            "`refused` (since the last line, a second before), `callbacks` (in"
            " hand): told by 503 to come again"
        ),
        "task.confirmed": "`status`, `results`",
        "image.stored": (
            "`image_id`, `index`, `media_type`, `bytes`, `width`, `height`, `sha256`, `duration_ms`"
        ),
        "image.retry": "`image_id`, `index`, `reason`, `attempt`, `wait_s`",
        "image.lost": "`image_id`, `index`, `reason`, `attempt`",
        "egress.refused": "`purpose`, `host`, `reason`",
        "task.erased": "`images`",
        "task.settled": "`state`, `code`, `images`, `seconds` (since it was queued)",
        "event.emitted": "`type`, `sequence`, `deliveries`",
        "delivery.attempted": (
            "`status`, `result`, `attempt` (0: by hand), `duration_ms`, `error`, `wait_s`"
        ),
        "delivery.exhausted": "`attempt`",
        "endpoint.disabled": "`reason`",
        "sink.published": (
            "`sink`, `events`, `sequence` (of the last), `duration_ms`: the broker"
            " has confirmed them"
        ),
        "sink.failed": (
            "`sink`, `wait_s`, `exception`: told once; the broker did not confirm, it"
            " is tried until it does"
        ),
        "sink.restored": "`sink`, `seconds` (since it failed)",
        "sink.shortened": (
            "`sink`, `bytes`: too large for the broker, so published without what"
            " its client asked for"
        ),
        "sink.missed": (
            "`sink`, `after`, `until` (sequences): events that went by their days while"
            " nobody published to this sink"
        ),
        "secrets.rekeyed": (
            "`count`: secrets of endpoints and owners that are now under the first"
            " key of `DARKROOM_SECRET_KEY`"
        ),
        "secrets.unreadable": (
            "`count`: no key of `DARKROOM_SECRET_KEY` decrypts them, and what"
            " they sign is not sent: put it back"
        ),
        "reconcile.queried": "`attempt`, `answer`, `wait_s`",
        "store.damaged": "`message`: nothing more is written to the file; put a backup back",
        "store.waiting": (
            "`reason`: the server starts up, or somebody has a table that is to be"
            " migrated; `limit_s`: how long it is tried"
        ),
        "store.unsafe": (
            "`setting`: off at the PostgreSQL server, which may lose what it committed"
            " when its power fails"
        ),
        "store.freed": (
            "`session`: of a process that stood still in the middle of a statement;"
            " what it had locked is free"
        ),
        "store.failed": (
            "`message`, `exception`: the store did not commit or answer; the caller got 503"
        ),
        "blobs.failed": (
            "`message`, `exception`: the image store failed or lacks an image: 503, or"
            " left to the sweep"
        ),
        "blobs.swept": "`seen`, `removed` (images that no row names), `duration_ms`",
        "retention.applied": (
            "`events`, `deliveries`, `tasks` (whose content went), `images`, `duration_ms`"
        ),
        "worker.failed": "`stage`, `key`, `attempt`, `wait_s`, `exception`",
        "task.parked": "`stage`, `cause` (so many faults or deaths)",
        "library.message": "`logger`, `message`: from a library, warnings and worse",
    }
)


def markdown() -> str:
    """The list as the README shows it."""
    always, known = (", ".join(f"`{name}`" for name in names) for names in (ALWAYS, WHERE_KNOWN))
    rows = [f"| `{name}` | {fields} |" for name, fields in LINES.items()]
    return "\n".join(
        ["| `event` | fields |", "|---|---|", f"| any | {always}, and where known {known} |", *rows]
    )
