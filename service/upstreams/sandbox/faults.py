"""The faults of the sandbox, as a table. A submission or an upload names its faults in an object
`sandbox`, and the sandbox has defaults.

An entry of `FAULTS` has a value and, for each place where the fault acts, a pure function. Its
first argument is the value, its last is what it changes:

    refuse(value, requests before) -> Answer | None    a refusal in place of a task
    end(value, end) -> TaskEnd                         how the task ends
    document(value, document) -> document              the task in every response and callback
    answer(value, answer) -> Answer                    the response to the submission of a task
    query(value, request, answer) -> Answer            the response to a query
    file(value, request, answer) -> Answer             a result file
    calls(value, document, waves) -> waves             the bodies of callbacks in waves

A fault without a function is read by its name. Faults act in the order of the table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from service.strict_json import JSON
from service.upstreams.sandbox.answers import Answer, ErrorPage, encoded
from service.upstreams.sandbox.effects import (
    REDIRECTS,
    TASK_ERRORS,
    UNUSABLE,
    CountedRequest,
    TaskEnd,
    billed,
    cancelled,
    contradicting,
    error_page,
    failed,
    forged,
    in_body,
    redirected,
    shaped,
    spoiled,
    typed,
    unnamed,
    with_field,
)
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
class InjectedFault:
    about: str
    takes: Value
    refuse: Callable[[Any, int], Answer | None] | None = None
    end: Callable[[Any, TaskEnd], TaskEnd] | None = None
    document: Callable[[Any, JSON], JSON] | None = None
    answer: Callable[[Any, Answer], Answer] | None = None
    query: Callable[[Any, CountedRequest, Answer], Answer] | None = None
    file: Callable[[Any, CountedRequest, Answer], Answer] | None = None
    calls: Callable[[Any, JSON, Waves], Waves] | None = None


FAULTS: Mapping[str, InjectedFault] = {
    "delay": InjectedFault("seconds the task takes", SECONDS),
    "images": InjectedFault(
        "number of images of a completed task, regardless of n",
        whole(0, 4),
        end=lambda n, end: replace(end, images=n),
    ),
    "fail": InjectedFault(
        "the task fails with this code", one_of(*TASK_ERRORS), end=lambda code, _: failed(code)
    ),
    "cancel": InjectedFault(
        "the task is cancelled, by its status or by an error code",
        one_of("status", "code"),
        end=cancelled,
    ),
    "format": InjectedFault("the format of the result files", one_of(*FORMATS)),
    "results": InjectedFault(
        "results come as objects with url, in result_data with image_url, with blanks and line ends"
        " around the links, or one as a text instead of a list",
        one_of("objects", "result_data", "padded", "text"),
        document=shaped,
    ),
    "results_late": InjectedFault(
        "a completed task has no results in its callback and in queries",
        FLAG,
        query=in_body(lambda on, body: unnamed(body) if on else body),
        calls=lambda on, _, waves: (
            [[unnamed(each) for each in wave] for wave in waves] if on else waves
        ),
    ),
    "unusable_field": InjectedFault(
        "every document has a field more, which nobody needs and no strict parser takes",
        one_of(*UNUSABLE),
        answer=in_body(spoiled),
        query=in_body(spoiled),
        calls=lambda name, _, waves: [[spoiled(name, each) for each in wave] for wave in waves],
    ),
    "usage": InjectedFault(
        "credits that a completed task reports. absent leaves usage out of every response",
        one_of("absent", otherwise=CREDITS),
        document=billed,
    ),
    "reserved": InjectedFault("credits that the upstream reserves for the task", CREDITS),
    "refund": InjectedFault("credits that queries of a completed task say are given back", CREDITS),
    "refund_after": InjectedFault("seconds from the end of a task to its refund", SECONDS),
    "submit_status": InjectedFault(
        "the submission is refused and nothing is created", PAGE, refuse=ErrorPage.answer
    ),
    "lose_submission": InjectedFault(
        "the first N attempts of a submission create nothing and lose their connection",
        whole(0, 1000),
        refuse=lambda times, before: Answer(500, b"", lost=True) if before < times else None,
    ),
    "submit_delay": InjectedFault(
        "seconds until a submission gets its response", SECONDS, answer=with_field("wait")
    ),
    "submit_cut": InjectedFault(
        "the response to a submission breaks off after N bytes", BYTES, answer=with_field("cut")
    ),
    "lose_answer": InjectedFault(
        "the task is created and the connection is cut", FLAG, answer=with_field("lost")
    ),
    "callback_first": InjectedFault(
        "the callback comes before the response to the submission", FLAG
    ),
    "upload_status": InjectedFault(
        "uploads of input images get this error. A code in digits is one of the file API's own",
        PAGE,
    ),
    "upload_delay": InjectedFault("seconds until an upload gets its response", SECONDS),
    "upload_cut": InjectedFault("the response to an upload breaks off after N bytes", BYTES),
    "lose_upload": InjectedFault("the file is stored and the connection is cut", FLAG),
    "upload_ttl": InjectedFault("seconds until an uploaded file expires", SECONDS),
    "query_status": InjectedFault("queries get this error", PAGE, query=error_page),
    "query_delay": InjectedFault(
        "seconds until a query gets its response", SECONDS, query=with_field("wait")
    ),
    "query_cut": InjectedFault(
        "responses to queries break off after N bytes", BYTES, query=with_field("cut")
    ),
    "query_times": InjectedFault(
        "only the first N queries of a task meet its faults", whole(0, 1000)
    ),
    "file_status": InjectedFault("requests for result files get this error", PAGE, file=error_page),
    "file_content": InjectedFault(
        "the content of result files is replaced", one_of(*FORGERIES), file=forged
    ),
    "file_type": InjectedFault(
        "the media type of result files", one_of("absent", otherwise=MEDIA_TYPE), file=typed
    ),
    "file_length": InjectedFault(
        "result files announce N bytes more than they have, or fewer",
        whole(-(1 << 30), 1 << 30),
        file=with_field("excess"),
    ),
    "file_cut": InjectedFault(
        "result files break off after N bytes", BYTES, file=with_field("cut")
    ),
    "file_stall": InjectedFault(
        "seconds without a byte in the middle of a result file", SECONDS, file=with_field("stall")
    ),
    "file_redirect": InjectedFault(
        "result links redirect: to another path of the file, another host, a private address,"
        " themselves, or the given URL",
        one_of(*REDIRECTS, otherwise=URL),
        file=redirected,
    ),
    "file_times": InjectedFault(
        "only the first N requests for a result file meet its faults", whole(0, 1000)
    ),
    "link_ttl": InjectedFault("seconds until the result links expire", SECONDS),
    "drop_callback": InjectedFault(
        "no callback is sent", FLAG, calls=lambda on, _, waves: [] if on else waves
    ),
    "repeat_callback": InjectedFault(
        "the callback is sent N times at once",
        whole(1, 100),
        calls=lambda times, _, waves: [wave * times for wave in waves],
    ),
    "slow_callback": InjectedFault(
        "seconds over which the body of a callback comes, byte by byte, after its head", SECONDS
    ),
    "contradict": InjectedFault(
        "a second callback says the opposite",
        FLAG,
        calls=lambda on, truth, waves: [*waves, [encoded(contradicting(truth))]] if on else waves,
    ),
    "garbage_callback": InjectedFault(
        "one more callback with an unreadable body",
        FLAG,
        calls=lambda on, _, waves: [*waves, [b"\x00{not json"]] if on else waves,
    ),
}


def applied(place: str, faults: Faults, *arguments: Any) -> Any:
    """The last argument as the faults of this place change it."""
    *context, changed = arguments
    for name, value in faults.items():
        if (change := getattr(FAULTS[name], place)) is not None:
            changed = change(value, *context, changed)
    return changed


def read_faults(asked: object, defaults: Faults) -> Faults:
    """A submission's faults over the defaults, in the table's order. Null switches a default off.

    ValueError says what is wrong.
    """
    asked = {} if asked is None else asked
    if not isinstance(asked, dict):
        raise ValueError("sandbox must be an object")  # noqa: TRY004 - like a wrong value
    given = {**defaults, **asked}
    for name in given:
        if name not in FAULTS:
            raise ValueError(f"sandbox has no fault {name[:100]!r}; it has {', '.join(FAULTS)}")
    return {name: convert(name, given[name]) for name in FAULTS if given.get(name) is not None}


def convert(name: str, value: object) -> Any:
    takes = FAULTS[name].takes
    if not takes.accepts(value):
        raise ValueError(f"sandbox.{name} must be {takes.words}")
    return takes.convert(value)


def drawn(defaults: Faults, shares: Mapping[str, float], seed: str) -> Faults:
    """The default faults that meet the submission of this seed, each with its share."""
    return {
        name: value
        for name, value in defaults.items()
        if Random(f"{seed}/{name}").random() < shares.get(name, 1)
    }


def check_shares(shares: Mapping[str, float], defaults: Faults) -> None:
    """ValueError: a share is not from 0 to 1, or its fault is no default."""
    for name, share in shares.items():
        if name not in defaults:
            raise ValueError(f"{name[:100]!r} has a share and is no default fault")
        if not 0 <= share <= 1:
            raise ValueError(f"the share of {name} must be from 0 to 1")
