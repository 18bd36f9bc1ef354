"""The faults of contract section 7: one table. A fault is asked for by an object `sandbox` in a
submission, or by default.

An entry of `FAULTS` says which values it takes and, where it acts, a pure function for that place;
it gets the fault's value first:

    refuse(value, times before) -> Answer | None       instead of creating a task
    outcome(value, outcome) -> Outcome                 how the task ends
    shown(value, document) -> document                 the task in every answer and callback
    answer(value, answer) -> Answer                    the answer to the submission that created the
    task query(value, asked, answer) -> Answer              the answer to a query file(value, asked,
    answer) -> Answer               a result file calls(value, waves, truth) -> waves
    bodies of callbacks: the waves one after another, those of a wave at once

Those without one are read by name. Faults act in the order of the table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from service.strict_json import JSON
from service.upstreams.base import Status
from service.upstreams.sandbox.answers import Answer, Page, encoded
from service.upstreams.sandbox.forgeries import FORGERIES
from service.upstreams.sandbox.renderer import FORMATS
from service.upstreams.sandbox.values import (
    BYTES,
    CREDITS,
    FLAG,
    MEDIA_TYPE,
    PAGE,
    SECONDS,
    URL,
    Value,
    one_of,
    whole,
)

Waves = list[list[bytes]]
Faults = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a task ends: with `images` of them, or an error."""

    status: Status
    images: int = 0
    error: JSON | None = None


TASK_ERRORS: Mapping[str, str] = {
    "content_policy_violation": "The prompt or an image violates the content policy.",
    "invalid_parameters": "The parameters are invalid.",
    "image_processing_error": "An input image could not be processed.",
    "image_dimension_mismatch": "The input images' dimensions do not match the request.",
    "request_cancelled": "The request was cancelled.",
    "service_error": "The service failed internally.",
    "generation_timeout": "The generation took too long.",
    "resource_exhausted": "No capacity is left for this request.",
    "quota_exceeded": "The quota is exceeded.",
    "service_unavailable": "The service is unavailable for now.",
    "generation_failed_no_content": "The generation brought no content.",
    "unknown_error": "An unknown error occurred.",
    "resource_not_found": "The resource does not exist or is gone.",
}


def failed(code: str) -> Outcome:
    return Outcome(
        Status.FAILED, error={"code": code, "message": TASK_ERRORS[code], "type": "task_error"}
    )


def contradicting(truth: JSON) -> JSON:
    """A terminal document that says the opposite of the true one."""
    bare = {
        key: value
        for key, value in truth.items()
        if key not in ("results", "result_data", "error", "usage")
    }
    if truth["status"] == Status.COMPLETED:
        return bare | {"status": "failed", "progress": 0, "error": failed("service_error").error}
    return bare | {
        "status": "completed",
        "progress": 100,
        "results": ["https://files.evolink.ai/contradiction/0.png"],
    }


# --- the table
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for a document or a file: how many were there before, and its path."""

    before: int
    path: str


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: what it does in a few words, the values it takes, and what it does where."""

    about: str
    takes: Value
    refuse: Callable[[Any, int], Answer | None] | None = None
    outcome: Callable[[Any, Outcome], Outcome] | None = None
    shown: Callable[[Any, JSON], JSON] | None = None
    answer: Callable[[Any, Answer], Answer] | None = None
    query: Callable[[Any, Asked, Answer], Answer] | None = None
    file: Callable[[Any, Asked, Answer], Answer] | None = None
    calls: Callable[[Any, Waves, JSON], Waves] | None = None


def cancelled(form: str, _: Outcome) -> Outcome:
    return Outcome(Status.CANCELLED) if form == "status" else failed("request_cancelled")


def shaped(form: str, shown: JSON) -> JSON:
    """The results in a form that only clients' code knows."""
    if "results" not in shown:
        return shown
    if form == "objects":
        return shown | {"results": [{"url": link} for link in shown["results"]]}
    bare = {key: value for key, value in shown.items() if key != "results"}
    return bare | {"result_data": [{"image_url": link} for link in shown["results"]]}


def billed(credits: str | float, shown: JSON) -> JSON:
    if credits == "absent":
        return {key: value for key, value in shown.items() if key != "usage"}
    return (
        shown | {"usage": shown["usage"] | {"credits_used": credits}}
        if "credits_used" in shown.get("usage", {})
        else shown
    )


def instead(value: Page, asked: Asked, answer: Answer) -> Answer:
    return value.shown(asked.before) or answer


def forged(name: str, _: Asked, answer: Answer) -> Answer:
    if answer.status != 200:
        return answer
    body, type = FORGERIES[name](answer.body, answer.headers["content-type"])
    return replace(answer, body=body, headers={**answer.headers, "content-type": type})


def typed(type: str, _: Asked, answer: Answer) -> Answer:
    others = {name: value for name, value in answer.headers.items() if name != "content-type"}
    return replace(answer, headers=others if type == "absent" else others | {"content-type": type})


# Where a redirect leads: the same path behind this. The file itself, a host nobody has, an address
# no outsider may reach, the link itself.
AIMS: Mapping[str, str] = {
    "path": "/moved",
    "host": "https://results.example",
    "private": "http://10.0.0.1",
    "loop": "/files",
}


def redirected(aim: str, asked: Asked, answer: Answer) -> Answer:
    if answer.status != 200 or asked.path.startswith("/moved/"):
        return answer
    location = AIMS[aim] + asked.path.removeprefix("/files") if aim in AIMS else aim
    return Answer(302, b"", {"location": location})


FAULTS: Mapping[str, Fault] = {
    "delay": Fault("seconds the task takes", SECONDS),
    "images": Fault(
        "number of images of a completed task, regardless of n",
        whole(0, 4),
        outcome=lambda n, end: replace(end, images=n),
    ),
    "fail": Fault(
        "the task fails with this code", one_of(*TASK_ERRORS), outcome=lambda code, _: failed(code)
    ),
    "cancel": Fault(
        "the task is cancelled, by its status or by an error code",
        one_of("status", "code"),
        outcome=cancelled,
    ),
    "format": Fault("the format of the result files", one_of(*FORMATS)),
    "results": Fault(
        "results come as objects with url, or in result_data with image_url, instead of links",
        one_of("objects", "result_data"),
        shown=shaped,
    ),
    "usage": Fault(
        "credits that a completed task reports. absent leaves usage out of every response",
        one_of("absent", otherwise=CREDITS),
        shown=billed,
    ),
    "submit_status": Fault(
        "the submission is refused and nothing is created",
        PAGE,
        refuse=lambda value, before: value.shown(before),
    ),
    "lose_submission": Fault(
        "the first N attempts of a submission create nothing and lose their connection",
        whole(0, 1000),
        refuse=lambda times, before: Answer(500, b"", lost=True) if before < times else None,
    ),
    "submit_delay": Fault(
        "seconds until a submission gets its response",
        SECONDS,
        answer=lambda wait, answer: replace(answer, wait=wait),
    ),
    "submit_cut": Fault(
        "the response to a submission breaks off after N bytes",
        BYTES,
        answer=lambda cut, answer: replace(answer, cut=cut),
    ),
    "lose_answer": Fault(
        "the task is created and the connection is cut",
        FLAG,
        answer=lambda on, answer: replace(answer, lost=on),
    ),
    "callback_first": Fault("the callback comes before the response to the submission", FLAG),
    "query_status": Fault("queries get this error", PAGE, query=instead),
    "query_delay": Fault(
        "seconds until a query gets its response",
        SECONDS,
        query=lambda wait, _, answer: replace(answer, wait=wait),
    ),
    "query_cut": Fault(
        "responses to queries break off after N bytes",
        BYTES,
        query=lambda cut, _, answer: replace(answer, cut=cut),
    ),
    "query_times": Fault("only the first N queries of a task meet its faults", whole(0, 1000)),
    "file_status": Fault("requests for result files get this error", PAGE, file=instead),
    "file_content": Fault(
        "the content of result files is replaced", one_of(*FORGERIES), file=forged
    ),
    "file_type": Fault(
        "the media type of result files", one_of("absent", otherwise=MEDIA_TYPE), file=typed
    ),
    "file_length": Fault(
        "result files announce N bytes more than they have, or fewer",
        whole(-(1 << 30), 1 << 30),
        file=lambda excess, _, answer: replace(answer, excess=excess),
    ),
    "file_cut": Fault(
        "result files break off after N bytes",
        BYTES,
        file=lambda cut, _, answer: replace(answer, cut=cut),
    ),
    "file_stall": Fault(
        "seconds without a byte in the middle of a result file",
        SECONDS,
        file=lambda s, _, answer: replace(answer, stall=s),
    ),
    "file_redirect": Fault(
        "result links redirect: to another path of the file, another host, a private address,"
        " themselves, or the given URL",
        one_of(*AIMS, otherwise=URL),
        file=redirected,
    ),
    "file_times": Fault(
        "only the first N requests for a result file meet its faults", whole(0, 1000)
    ),
    "link_ttl": Fault("seconds until the result links expire", SECONDS),
    "drop_callback": Fault(
        "no callback is sent", FLAG, calls=lambda on, waves, _: [] if on else waves
    ),
    "repeat_callback": Fault(
        "the callback is sent N times at once",
        whole(1, 100),
        calls=lambda times, waves, _: [wave * times for wave in waves],
    ),
    "slow_callback": Fault(
        "seconds over which the body of a callback comes, byte by byte, after its head", SECONDS
    ),
    "contradict": Fault(
        "a second callback says the opposite",
        FLAG,
        calls=lambda on, waves, truth: [*waves, [encoded(contradicting(truth))]] if on else waves,
    ),
    "garbage_callback": Fault(
        "one more callback with an unreadable body",
        FLAG,
        calls=lambda on, waves, _: [*waves, [b"\x00{not json"]] if on else waves,
    ),
}


def read_faults(asked: object, defaults: Faults) -> Faults:
    """The faults of a submission over the default ones, in the table's order; null takes a default
    away. ValueError names what is wrong.
    """
    asked = {} if asked is None else asked
    if not isinstance(asked, dict):
        # a value among others, all told the same way
        raise ValueError("sandbox must be an object")  # noqa: TRY004
    given = {**defaults, **asked}
    for name in given:
        if name not in FAULTS:
            raise ValueError(f"sandbox has no fault {name[:100]!r}; it has {', '.join(FAULTS)}")
    return {name: take(name, given[name]) for name in FAULTS if given.get(name) is not None}


def take(name: str, value: object) -> Any:
    takes = FAULTS[name].takes
    if not takes.accepts(value):
        raise ValueError(f"sandbox.{name} must be {takes.words}")
    return takes.made(value)


def struck(defaults: Faults, shares: Mapping[str, float], lot: str) -> Faults:
    """The default faults that this lot draws: each strikes its share of lots, 1 unless `shares`
    says otherwise.
    """
    return {
        name: value
        for name, value in defaults.items()
        if Random(f"{lot}/{name}").random() < shares.get(name, 1)
    }


def check_shares(shares: Mapping[str, float], defaults: Faults) -> None:
    """ValueError for the share of a fault that is no default, or one that is not from 0 to 1."""
    for name, share in shares.items():
        if name not in defaults:
            raise ValueError(f"{name[:100]!r} has a share and is no default fault")
        if not 0 <= share <= 1:
            raise ValueError(f"the share of {name} must be from 0 to 1")
