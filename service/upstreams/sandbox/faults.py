"""The faults of contract section 7: one table. A fault is asked for by an object `sandbox` in a submission, or by default.

An entry of `FAULTS` says which values it takes and, where it acts, a pure function for that place; it gets the fault's value first:

    refuse(value, times before) -> Answer | None       instead of creating a task
    outcome(value, outcome) -> Outcome                 how the task ends
    answer(value, answer) -> Answer                    the answer to the submission that created the task
    query(value, times before, answer) -> Answer       the answer to a query
    file(value, times before, answer) -> Answer        a result file
    calls(value, waves, truth) -> waves                bodies of callbacks: the waves one after another, those of a wave at once

Those without one (`delay`, `format`, `link_ttl`, `callback_first`) are read by name. Faults act in the order of the table.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from service.model import JSON, Status
from service.upstreams.sandbox.answers import Answer, Page, encoded

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
    return Outcome(Status.FAILED, error={"code": code, "message": TASK_ERRORS[code], "type": "task_error"})


def contradicting(truth: JSON) -> JSON:
    """A terminal document that says the opposite of the true one."""
    bare = {key: value for key, value in truth.items() if key not in ("results", "error", "usage")}
    if truth["status"] == Status.COMPLETED:
        return bare | {"status": "failed", "progress": 0, "error": failed("service_error").error}
    return bare | {"status": "completed", "progress": 100, "results": ["https://files.evolink.ai/contradiction/0.png"]}


# --- values ----------------------------------------------------------------------------------------------------------


def flag(value: object) -> bool:
    if value is not True and value is not False:
        raise ValueError("true or false")
    return value


def seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 86400:
        raise ValueError("seconds from 0 to 86400")
    return float(value)


def whole(least: int, most: int) -> Callable[[object], int]:
    def take(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"an integer from {least} to {most}")
        return value

    return take


def word(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[a-z_]{1,100}", value):
        raise ValueError("a word of a-z and _")
    return value


def one_of(*words: str) -> Callable[[object], str]:
    def take(value: object) -> str:
        if not isinstance(value, str) or value not in words:
            raise ValueError("one of " + ", ".join(words))
        return value

    return take


PAGE_FIELDS: Mapping[str, Callable[[object], Any]] = {
    "status": whole(300, 599),
    "code": word,
    "html": flag,
    "retry_after": whole(0, 86400),
    "times": whole(0, 1000),
}


def page(value: object) -> Page:
    """A status alone, or an object with the fields of `Page`."""
    fields = value if isinstance(value, dict) else {"status": value}
    try:
        return Page(**{name: PAGE_FIELDS[name](item) for name, item in fields.items()})
    except (KeyError, TypeError, ValueError):
        wanted = "a status from 300 to 599, or an object with status, code, html, retry_after, times"
        raise ValueError(wanted) from None


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: what it does in a few words, the values it takes, and what it does where."""

    about: str
    takes: Callable[[object], Any]
    refuse: Callable[[Any, int], Answer | None] | None = None
    outcome: Callable[[Any, Outcome], Outcome] | None = None
    answer: Callable[[Any, Answer], Answer] | None = None
    query: Callable[[Any, int, Answer], Answer] | None = None
    file: Callable[[Any, int, Answer], Answer] | None = None
    calls: Callable[[Any, Waves, JSON], Waves] | None = None


def cancelled(form: str, _: Outcome) -> Outcome:
    return Outcome(Status.CANCELLED) if form == "status" else failed("request_cancelled")


def instead(value: Page, before: int, answer: Answer) -> Answer:
    return value.shown(before) or answer


FAULTS: Mapping[str, Fault] = {
    "delay": Fault("seconds the task takes", seconds),
    "images": Fault("how many images a completed task has, whatever n says", whole(0, 4), outcome=lambda n, end: replace(end, images=n)),
    "fail": Fault("the task fails with this code", one_of(*TASK_ERRORS), outcome=lambda code, _: failed(code)),
    "cancel": Fault("cancelled, by its status or by an error code", one_of("status", "code"), outcome=cancelled),
    "format": Fault("of the result files", one_of("png", "jpeg", "webp")),
    "submit_status": Fault("the submission is refused: nothing is created", page, refuse=lambda value, before: value.shown(before)),
    "submit_delay": Fault("seconds until a submission is answered", seconds, answer=lambda wait, answer: replace(answer, wait=wait)),
    "lose_answer": Fault("the task is created, the connection is cut", flag, answer=lambda on, answer: replace(answer, cut=on)),
    "callback_first": Fault("the callback comes before the answer to the submission", flag),
    "query_status": Fault("queries get this error", page, query=instead),
    "query_delay": Fault("seconds until a query is answered", seconds, query=lambda wait, _, answer: replace(answer, wait=wait)),
    "file_status": Fault("result files get this error", page, file=instead),
    "link_ttl": Fault("seconds until the result links die", seconds),
    "drop_callback": Fault("no callback is sent", flag, calls=lambda on, waves, _: [] if on else waves),
    "repeat_callback": Fault(
        "the callback is sent so many times at once", whole(1, 100), calls=lambda times, waves, _: [wave * times for wave in waves]
    ),
    "contradict": Fault(
        "a second callback says the opposite",
        flag,
        calls=lambda on, waves, truth: [*waves, [encoded(contradicting(truth))]] if on else waves,
    ),
    "garbage_callback": Fault(
        "one more callback that nobody can read", flag, calls=lambda on, waves, _: [*waves, [b"\x00{not json"]] if on else waves
    ),
}


def read_faults(asked: object, defaults: Faults) -> Faults:
    """The faults of a submission over the default ones, in the table's order; null takes a default away. ValueError names what is wrong."""
    asked = {} if asked is None else asked
    if not isinstance(asked, dict):
        raise ValueError("sandbox must be an object")  # noqa: TRY004 - a value among others, all told the same way
    given = {**defaults, **asked}
    for name in given:
        if name not in FAULTS:
            raise ValueError(f"sandbox has no fault {name[:100]!r}; it has {', '.join(FAULTS)}")
    return {name: take(name, given[name]) for name in FAULTS if given.get(name) is not None}


def take(name: str, value: object) -> Any:
    try:
        return FAULTS[name].takes(value)
    except ValueError as wrong:
        raise ValueError(f"sandbox.{name} must be {wrong}") from None
