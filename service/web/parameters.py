"""The query parameters and headers of the API: the values that the code accepts."""

from collections.abc import Mapping

from service.strict_json import JSON
from service.tasks.state import State
from service.tasks.usage import GROUPS
from service.web.event_schemas import TYPE_PATTERNS
from service.web.field_schemas import OWNER, TEXT

LIMIT, MAX_LIMIT = 100, 1000
MAX_WAIT_S, MAX_TYPES = 60, 32
PAGE_SIZE, MAX_PAGE_SIZE, MAX_PAGE = 20, 100, 10**6
SEQUENCE = r"^0?[0-8]?[0-9]{1,18}$"  # below 2**63
UNIX = r"^[0-9]{1,10}(\.[0-9]{1,9})?$"
CURSOR = r"^[0-9]{1,15}\.[A-Za-z0-9._-]{1,100}$"  # time and id of the last item
ENTRY_ID = r"^led_[a-z2-7]{26}$"
ACT_ID = r"^act_[a-z2-7]{26}$"
IDEMPOTENCY_KEY = r"^[\x21-\x7e]{1,255}$"
HTTP_STATUS = r"^[1-5][0-9]{2}$"
PATH_ID = r"^[!-~]{1,200}$"


def text(about: str, **more: object) -> JSON:
    return {"schema": {**TEXT, **more}, "description": about}


def one_of(about: str, *values: str) -> JSON:
    return {"schema": {"type": "string", "enum": list(values)}, "description": about}


def number(least: int, most: int, default: int | None, about: str, type: str = "integer") -> JSON:
    limits = {"minimum": least, "maximum": most}
    limits |= {} if default is None else {"default": default}
    return {"schema": {"type": type, **limits}, "description": about}


def time(about: str, *formats: str) -> JSON:
    """RFC 3339, another format, or seconds since 1970."""
    kinds = [{"type": "string", "format": format} for format in ("date-time", *formats)]
    return {
        "schema": {"anyOf": [*kinds, {"type": "string", "pattern": UNIX}]},
        "description": about,
    }


ANY_TEXT: JSON = {"type": "string"}
OWNERS = text("an owner; another one than the key's own needs the scope `admin`", pattern=OWNER)
TYPES: JSON = {
    "schema": {
        "type": "array",
        "items": {"type": "string", "enum": list(TYPE_PATTERNS)},
        "maxItems": MAX_TYPES,
    },
    "description": "event types; a type that ends with `.*` names all that begin so",
}

# Under a name alone, or under a path and a name where the name means something else there.
QUERY: Mapping[str, JSON] = {
    "limit": number(1, MAX_LIMIT, LIMIT, "the most items of the page"),
    "cursor": text("`next_cursor` of the page before", pattern=CURSOR),
    "owner": OWNERS,
    "since": time("what was created from this time on"),
    "until": time("what was created before this time"),
    "from": time("from this time or the beginning of this day (UTC) on", "date"),
    "to": time("before this time or up to the end of this day (UTC)", "date"),
    "by": {**one_of("the groups of the report", *GROUPS)},
    "most": number(1, MAX_LIMIT, None, "only this many rows, those with the highest cost"),
    "state": one_of("the state of the task", *(state.value for state in State)),
    "/v1/deliveries state": one_of("the delivery's state", "pending", "delivered", "dead"),
    "model": text("the name of the model"),
    "metadata.KEY": text("the value of the key KEY of `metadata`, at most 16 such filters"),
    "task": text("the id of a task"),
    "endpoint": text("the id of an endpoint"),
    "event": text("the id of an event"),
    "error": text("the code of the task's error"),
    "/v1/deliveries error": text("the cause of the failure, as the groups name it"),
    "status": text("the HTTP status of the last response", pattern=HTTP_STATUS),
    "prompt": text("a part of the prompt, among the key's owner's own tasks"),
    "type": TYPES,
    "after": text("the sequence of the last event seen", pattern=SEQUENCE),
    "/v1/ledger after": text("the id of the last entry seen", pattern=ENTRY_ID),
    "/v1/audit after": text("the id of the last entry seen", pattern=ACT_ID),
    "action": text("the name of the action, such as `task.resolve`"),
    "target": text("the id of what was acted on"),
    "wait": number(0, MAX_WAIT_S, 0, "seconds to wait for an event", "number"),
    "flatten": one_of("replaces an alpha channel by this colour", "white"),
    "expires": {"schema": ANY_TEXT, "description": "of a signed link: seconds since 1970"},
    "signature": {"schema": ANY_TEXT, "description": "of a signed link"},
    "page": number(1, MAX_PAGE, 1, "the number of the page"),
    "pageSize": number(1, MAX_PAGE_SIZE, PAGE_SIZE, "the most files of the page"),
}
PATHS: Mapping[str, JSON] = {"owner": {"schema": {**TEXT, "pattern": OWNER}}}
SUBMIT_HEADERS: Mapping[str, JSON] = {
    "Idempotency-Key": text(
        "unique per owner: a repeated request gets the first task", pattern=IDEMPOTENCY_KEY
    ),
    "Prefer": {
        "schema": {"type": "string", "examples": ["wait=30", "respond-async"]},
        "description": "`wait=N`: until the task has ended, at most N seconds and at most 120."
        " `respond-async`: do not wait. Other preferences are ignored (RFC 7240)",
    },
}
STREAM_HEADERS: Mapping[str, JSON] = {
    "Last-Event-ID": text("of a stream: its position, which wins over `after`")
}


def parameters(path: str, names: tuple[str, ...], path_names: list[str]) -> list[JSON]:
    documents = [
        {"name": name, "in": "path", "required": True}
        | PATHS.get(name, {"schema": {"type": "string", "pattern": PATH_ID}})
        for name in path_names
    ]
    for name in names:
        about = QUERY.get(f"{path} {name}") or QUERY[name]
        documents.append({"name": name, "in": "query", "required": False, **about})
    return documents


def headers(given: Mapping[str, JSON]) -> list[JSON]:
    return [{"name": name, "in": "header", "required": False, **given[name]} for name in given]
