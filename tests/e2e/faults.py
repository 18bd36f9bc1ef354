"""The faults of an upstream: a name, the behaviour and the required outcome. `docs/faults.md` has a
row for each name.
"""

import gzip
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from tests.e2e.behaviours import (
    CUT,
    HANGS,
    MAX_BYTES,
    NOTHING,
    Answer,
    Behaviour,
    accepted,
    another,
    asked,
    completed,
    document,
    error,
    failed,
    foreign,
    gone,
    half,
    leads,
    linked,
    misplaced,
    moving,
    noise,
    page,
    picture,
    raw,
    redirected,
    shaped,
    shaped_picture,
    short,
    told,
    true,
    twice,
    with_,
)
from tests.partial import UNUSABLE
from tests.untidy import CODINGS, FRAMING, LIMITS, PLAIN, Shape, cut

RETRIED, UNCERTAIN, REFUSED = (
    ("task.submission_retried",),
    ("task.submission_uncertain",),
    ("task.submission_refused",),
)
CONFLICT, SILENT, RETRY, LOST = (
    ("callback.conflict",),
    ("reconcile.queried",),
    ("image.retry",),
    ("image.lost",),
)
STORED = ("image.stored",)
CALLED, EVERY = ("callback.received",), 50
FAILED: Mapping[str, Any] = {"state": "failed", "images": (), "credits": None}
CANCEL: Mapping[str, Any] = {
    "state": "cancelled",
    "code": "request_cancelled",
    "images": (),
    "credits": None,
}
LOST_ONE: dict[str, Any] = {
    "for_ever": True,
    "state": "failed",
    "code": "results_lost",
    "images": (1,),
    "tells": LOST,
}
GUARD: dict[str, Any] = {"tells": ("image.retry", "egress.refused", "image.at_risk")}
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
# Responses that browsers and curl read.
UNTIDY = {
    "large_header": LIMITS["a policy of 9,000 bytes"],
    "many_headers": LIMITS["400 lines"],
    "length_twice": FRAMING["the same length twice"],
    "name_with_blank": FRAMING["a name with a blank"],
    "chunked_and_length": FRAMING["chunked behind a length"],
    "gzip": CODINGS["gzip"],
    "whole_but_cut": Shape(cut(PLAIN), ends=True),
}
PARTS = {
    "half_an_emoji": "half an emoji",
    "nul": "an escaped NUL",
    "nan": "NaN",
    "latin_1": "Latin-1",
    "name_twice": "a name twice",
}
FRAMES = moving(1, 0, 200, 40)  # small ones, but too many


def proved(*submits: Any, **more: Any) -> Behaviour:
    """The submission's outcome is unknown until a callback arrives."""
    return Behaviour(submits=submits, when="now", tells=(*UNCERTAIN, *CALLED), **more)


def unproved(*submits: Any) -> Behaviour:
    """Nobody will ever know."""
    return Behaviour(submits, False, code="submission_uncertain", tells=UNCERTAIN, **FAILED)


def refused(status: int, code: object, known_as: str | None = None) -> Behaviour:
    answer = error(status, code)
    return Behaviour(
        (answer,), False, code=known_as or str(code), status=status, tells=REFUSED, **FAILED
    )


def fails(code: str) -> Behaviour:
    return Behaviour(truth=failed(code), code=code, **FAILED, tells=("task.confirmed",))


def says(*bodies: Any, **more: Any) -> Behaviour:
    return Behaviour(callbacks=bodies, **{"tells": CALLED} | more)


def asks(*queries: Any) -> Behaviour:
    """A callback arrives, and for a while no query confirms it."""
    return Behaviour(queries=queries, tells=("upstream.called",))


def beside(name: str, step: Any) -> Any:
    """The answer with a part that nobody needs, which no strict parser of JSON takes."""
    part = b"{" + UNUSABLE[name] + b", "
    return lambda task: replace(made := step(task), body=part + made.body[1:])


def later(**fields: Any) -> Behaviour:
    """The callback and two queries name no result, and the third query does."""
    body = with_(**fields)
    return Behaviour(
        callbacks=(told(body),), queries=(asked(body),) * 2, tells=("task.results_awaited",)
    )


def inline(task: Any) -> Any:
    return "data:image/png;base64," + b64encode(task.pictures[0]).decode()


def serves(*files: Any, **more: Any) -> Behaviour:
    return Behaviour(files=files, **{"tells": RETRY} | more)


SUBMISSIONS = {
    "submit_429": Behaviour((error(429, "rate_limit_exceeded"),) * 2 + (None,), tells=RETRIED),
    "submit_429_retry_after": Behaviour(
        (error(429, "rate_limit_exceeded", retry_after="1"), None), tells=RETRIED
    ),
    "submit_429_integer_code": Behaviour((error(429, 429), None), tells=RETRIED),
    "submit_429_for_ever": Behaviour(
        (error(429, "rate_limit_exceeded"),), False, code="not_submitted", **FAILED, tells=RETRIED
    ),
    "submit_503_json": Behaviour((error(503, "service_unavailable"), None), tells=RETRIED),
    "submit_401": Behaviour((error(401, "unauthorized"), None), tells=RETRIED),
    "submit_403_account": Behaviour((error(403, "key_quota_exhausted"), None), tells=RETRIED),
    "submit_400": refused(400, "invalid_parameter"),
    "submit_400_integer_code": refused(400, 400, "invalid_request"),
    "submit_402": refused(402, "insufficient_quota"),
    "submit_403_model": refused(403, "model_access_denied"),
    "submit_404": refused(404, "model_not_found"),
    "submit_413": refused(413, "request_too_large"),
    "submit_422": refused(422, "content_filter"),
    "submit_timeout": proved(HANGS),
    "submit_cut_after_request": proved(CUT),
    "submit_cut_in_answer": proved(half(accepted)),
    "submit_200_without_id": proved(Answer(body=b'{"status": "pending"}')),
    "submit_200_hostile_id": proved(Answer(body=b'{"id": "../credits", "status": "pending"}')),
    "submit_200_duplicate_keys": proved(
        Answer(body=b'{"id": "task-unified-a", "id": "task-unified-b", "status": "pending"}')
    ),
    "submit_200_html": proved(page(200)),
    "submit_500": proved(error(500, "internal_error")),
    "submit_502_upstream_error": proved(error(502, "upstream_error")),
    "submit_503_html": proved(page(503)),
    "submit_524": proved(page(524)),
    "submit_paid_outcome_unknown": proved(error(409, "paid_outcome_unknown")),
    "submit_idempotency_conflict": proved(error(409, "idempotency_conflict")),
    "submit_408": proved(error(408, "timeout")),
    "submit_answered_completed": Behaviour((asked(completed),), callbacks=(), tells=SILENT),
    **{
        f"submit_{name}": Behaviour((shaped(shape, accepted),), callbacks=(), tells=SILENT)
        for name, shape in UNTIDY.items()
    },
    **{
        f"submit_with_{name}": Behaviour((beside(part, accepted),), callbacks=(), tells=SILENT)
        for name, part in PARTS.items()
    },
    "submit_redirected": unproved(redirected(307)),
    "submit_lost_unproved": unproved(CUT),
    "submit_503_html_unproved": unproved(page(503)),
    "submit_403_html": unproved(page(403)),
    "submit_429_then_lost": unproved(error(429, "rate_limit_exceeded"), CUT),
    "submit_proved_too_late": Behaviour(
        (CUT,),
        when="ended",
        state="failed",
        code="submission_uncertain",
        tells=(*UNCERTAIN, "task.late_result"),
    ),
    "submit_failure_proved_too_late": Behaviour(
        (CUT,),
        when="ended",
        truth=failed("service_error"),
        state="failed",
        code="submission_uncertain",
        images=(),
        credits=None,
        tells=(*UNCERTAIN, "task.late_result"),
    ),
}

CALLBACKS = {
    "callback_never": Behaviour(callbacks=(), tells=SILENT),
    "callback_thrice_at_once": says(true, true, true, at_once=True),
    "callback_before_answer": says(true, when="before"),
    "callback_after_settling": says(true, when="ended"),
    "callback_true_then_contradicting": says(true, told(failed("service_error")), tells=CONFLICT),
    "callback_contradicting_then_true": says(told(failed("service_error")), true),
    "callback_contradicting_at_once": says(
        true,
        told(failed("service_error")),
        told(with_(status="cancelled")),
        at_once=True,
        tells=CONFLICT,
    ),
    "callback_contradicting_after_settling": says(
        told(failed("service_error")), when="ended", tells=CONFLICT
    ),
    "callback_other_results": says(
        told(linked(lambda task: {"results": [task.link(position) for position in (7, 8, 9)]}))
    ),
    "callback_forbidden_results": says(
        told(linked(lambda task: {"results": [task.forbidden, task.forbidden]}))
    ),
    "callback_false": says(
        told(completed), truth=failed("service_error"), code="service_error", **FAILED
    ),
    "callback_wrong_id": says(told(foreign), tells=CONFLICT),
    "callback_wrong_id_before_answer": says(told(foreign), when="before"),
    "callback_garbage": says(raw(b"\x00\xff no json"), raw(b"<html></html>"), raw(b"")),
    "callback_wrong_types": says(raw(b'{"id": 5, "status": ["completed"], "results": {"0": 1}}')),
    "callback_deep": says(raw(b"[" * 100_000)),
    "callback_lone_surrogate": says(
        raw(b'{"id": "\\ud800", "status": "completed", "results": ["\\u0000"]}')
    ),
    "callback_duplicate_keys": says(twice),
    **{
        f"callback_with_{name}": says(
            lambda task, part=part: beside(part, asked(completed))(task).body
        )
        for name, part in PARTS.items()
    },
    "callback_compressed": says(lambda task: gzip.compress(true(task))),
    "callback_processing_only": says(told(with_(status="processing", results=[])), tells=SILENT),
    "callback_unknown_status": says(told(with_(status="archiving")), tells=SILENT),
}

QUERIES = {
    "query_404_for_a_while": asks(error(404, "task_not_found"), error(404, "task_not_found")),
    "query_html_200": asks(page(200), page(200)),
    "query_html_502": asks(page(502), page(502)),
    "query_500": asks(error(500, "internal_error")),
    "query_429": asks(error(429, "rate_limit_exceeded", retry_after="1")),
    "query_401": asks(error(401, "unauthorized")),
    "query_timeout": asks(HANGS),
    "query_cut": asks(half(asked(completed))),
    "query_redirected": asks(redirected(302)),
    "query_processing_after_callback": asks(*[asked(with_(status="processing", results=[]))] * 2),
    "query_unknown_status": asks(asked(with_(status="archiving"))),
    "query_duplicate_keys": asks(lambda task: Answer(body=twice(task))),
    "query_other_task": asks(asked(foreign)),
    **{
        f"query_{name}": asks(*[shaped(shape, asked(completed))] * EVERY)
        for name, shape in UNTIDY.items()
    },
    **{
        f"query_with_{name}": asks(*[beside(part, asked(completed))] * EVERY)
        for name, part in PARTS.items()
    },
    "query_502_until_links_die": Behaviour(
        queries=(page(502),) * 2,
        files=(picture(honest=True), page(410)),
        for_ever=True,
        tells=(*STORED, "upstream.called"),
    ),
}

OUTCOMES = {
    "results_as_objects": says(
        true,
        truth=linked(
            lambda task: {"results": [{"url": task.link(0)}, {"url": task.link(1), "w": 8}]}
        ),
    ),
    "results_in_result_data": says(
        true,
        truth=linked(
            lambda task: {
                "results": None,
                "result_data": [{"image_url": task.link(0)}, {"image_url": task.link(1)}],
            }
        ),
    ),
    "results_http_links": says(true),
    "results_as_text": says(
        true, truth=linked(lambda task: {"results": task.link(0)}), images=(0,)
    ),
    "results_with_line_ends": says(
        true,
        truth=linked(lambda task: {"results": [f"{task.link(0)}\n", f"\t {task.link(1)}\r\n"]}),
    ),
    "results_with_long_links": says(
        true,
        truth=linked(lambda task: {"results": [f"{task.link(at)}?{'x' * 7000}" for at in (0, 1)]}),
    ),
    "results_in_the_answer": says(
        true, truth=linked(lambda task: {"results": [inline(task), task.link(1)]})
    ),
    "results_later": later(results=[]),
    "results_null_later": later(results=None),
    "results_without_links_later": later(results=[None, {"url": ""}]),
    "results_fewer": says(
        true, truth=linked(lambda task: {"results": [task.link(0)]}), images=(0,)
    ),
    "results_none": says(
        told(with_(results=[])),
        truth=with_(results=[]),
        state="failed",
        code="no_results",
        images=(),
        tells=("task.results_awaited",),
    ),
    "results_no_link": says(
        true, truth=linked(lambda task: {"results": ["no link", task.link(1)]}), **LOST_ONE
    ),
    "results_forbidden_link": says(
        true,
        truth=linked(lambda task: {"results": [task.forbidden, task.link(1)]}),
        **LOST_ONE | {"tells": ("image.lost", "egress.refused")},
    ),
    "status_in_capitals": says(true, truth=with_(status="COMPLETED")),
    "cancelled": says(true, truth=lambda task: document(task, "cancelled"), **CANCEL),
    "cancelled_with_one_l": says(true, truth=lambda task: document(task, "canceled"), **CANCEL),
    "cancelled_as_failed": says(true, truth=failed("request_cancelled"), **CANCEL),
    "failed_content_policy": fails("content_policy_violation"),
    "failed_service_error": fails("service_error"),
    "failed_unknown_code": fails("a_code_of_tomorrow"),
    "failed_bare": says(
        true, truth=lambda task: {"id": task.id, "status": "failed"}, code="unknown_error", **FAILED
    ),
    "failed_error_as_text": says(
        true, truth=lambda _: {"status": "failed", "error": "broke"}, code="unknown_error", **FAILED
    ),
    "failed_resource_not_found": says(
        true,
        truth=failed("resource_not_found"),
        state="expired",
        code="expired",
        images=(),
        credits=None,
    ),
    "usage_absent": says(true, truth=with_(usage=None), credits=None),
    "usage_decimal": says(
        true, truth=with_(usage={"credits_reserved": 8.7, "credits_used": 0.05}), credits=0.05
    ),
    "usage_garbage": says(
        true, truth=with_(usage=["free"], progress="all", task_info=7, created="now"), credits=None
    ),
}

RESULTS = {
    "file_redirect_forbidden": serves(*[leads(lambda task: task.forbidden)] * 2, **GUARD),
    "file_redirect_allowed": serves(
        *[leads(lambda task: f"/files/{task.id}/0-moved.png")] * EVERY, tells=STORED
    ),
    "file_redirect_to_itself": serves(*[leads(lambda task: task.link(0))] * 6, **GUARD),
    **{
        f"file_{name}": serves(*[shaped_picture(shape)] * EVERY, tells=STORED)
        for name, shape in UNTIDY.items()
    },
    "file_404_until_fresh_link": serves(
        *[gone] * EVERY,
        truth=linked(
            lambda task: {"results": [task.link(0, task.asked), task.link(1, task.asked)]}
        ),
        tells=STORED,  # a link that was replaced meanwhile does not count as a retry
    ),
    "file_403_for_a_while": serves(page(403), page(403)),
    "file_500": serves(page(500), error(503, "busy", retry_after="1")),
    "file_cut": serves(picture(part=0.5), picture(part=0.2), tells=STORED),
    "file_changed_after_cut": serves(another('"v0"'), tells=STORED),
    "file_changed_without_etag": serves(another(""), large="JPEG", etag="", tells=STORED),
    "file_rest_misplaced": serves(picture(part=0.5), misplaced, tells=STORED),
    "file_rest_refused": serves(picture(part=0.5), page(416), tells=STORED),
    "file_stalled": serves(picture(part=0.5, stalls=True), tells=STORED),
    "file_truncated": serves(picture(part=0.7, honest=True)),
    "file_length_too_long": serves(
        lambda task, _: Answer(200, task.pictures[0], announced=len(task.pictures[0]) + 1000),
        tells=STORED,
    ),
    "file_length_too_short": serves(short),
    "file_empty": serves(NOTHING),
    "file_html_200": serves(page(200)),
    "file_html_200_for_a_while": serves(*[page(200)] * 10),
    "file_svg": serves(Answer(body=SVG, headers={"content-type": "image/png"})),
    "file_bomb": serves(
        Answer(body=moving(2, 0, 1500, 1), headers={"content-type": "image/png"}), **LOST_ONE
    ),
    "file_bomb_of_frames": serves(
        Answer(body=FRAMES, headers={"content-type": "image/webp"}), **LOST_ONE
    ),
    "file_over_bytes": serves(Answer(body=b"\x89PNG\r\n\x1a\n" + bytes(MAX_BYTES)), **LOST_ONE),
    "file_wrong_type": serves(
        *[picture(content_type="text/html", honest=True)] * EVERY, tells=STORED
    ),
    "file_animated": serves(makes=moving, tells=STORED),
    "file_polyglot": serves(makes=lambda *picture: noise(*picture) + SVG, tells=STORED),
}

BEHAVIOURS: Mapping[str, Behaviour] = MappingProxyType(
    {**SUBMISSIONS, **CALLBACKS, **QUERIES, **OUTCOMES, **RESULTS}
)
