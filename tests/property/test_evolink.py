"""No bytes make the parser of the upstream's answers raise, and no parsed text is unfit for a
store.
"""

import json
import re
from dataclasses import astuple

from hypothesis import example, given
from hypothesis import strategies as st

from service.upstreams.base import Accepted, NotCreated, Refused, Report, Uncertain
from service.upstreams.reports import parse_task
from service.upstreams.verdicts import classify_query, classify_submit

ANY = st.text(st.characters(codec=None))  # with NUL and lone surrogates
FIT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.just(10**400)
DECIMALS = st.from_regex(r"-?[0-9]{1,3}(\.[0-9]{1,9})?([eE][-+]?[0-9]{1,12})?", fullmatch=True)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | FIT | DECIMALS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIT, inner, max_size=3),
    max_leaves=6,
)
IDS = st.sampled_from(["task-unified-1", "task-unified-2"]) | VALUES
STATUSES = (
    st.sampled_from(["pending", "processing", "completed", "failed", "canceled", "CANCELLED"])
    | VALUES
)
CODES = (
    st.sampled_from(
        ["request_cancelled", "paid_outcome_unknown", "key_disabled", "rate_limit_exceeded", 403]
    )
    | VALUES
)
ERRORS = (
    st.fixed_dictionaries(
        {}, optional={"code": CODES, "message": VALUES, "type": VALUES, "param": VALUES}
    )
    | VALUES
)
USAGE = (
    st.dictionaries(
        st.sampled_from(["credits_used", "credits_reserved", "billing_rule", "user_group"]),
        DECIMALS | VALUES,
    )
    | VALUES
)
INFO = st.dictionaries(st.sampled_from(["estimated_time", "can_cancel"]), VALUES) | VALUES
OTHERS = dict.fromkeys(("results", "result_data", "progress", "created", "model"), VALUES)
HOSTILE = {"extra": ANY | st.floats() | st.dictionaries(ANY, ANY, max_size=2)}
TASKS = st.fixed_dictionaries(
    {},
    optional={"id": IDS, "status": STATUSES, "error": ERRORS, "usage": USAGE, "task_info": INFO}
    | OTHERS
    | HOSTILE,
)
BODIES = st.binary() | (TASKS | st.lists(TASKS, max_size=1)).map(
    lambda document: json.dumps(document).encode()
)
HTTP = st.sampled_from([200, 307, 400, 401, 403, 408, 429, 500, 502, 503]) | st.integers(0, 999)


def texts(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for item in value.items() for text in texts(item)]
    return (
        [text for item in value for text in texts(item)] if isinstance(value, tuple | list) else []
    )


def assert_fit(report: Report) -> None:
    for text in texts(astuple(report)):
        assert not re.search("[\0\ud800-\udfff]", text)
        assert len(text) <= 4096
    assert len(report.results) <= 64
    assert report.progress is None or 0 <= report.progress <= 100
    for number in (report.estimated_time, report.credits_reserved, report.credits_used):
        assert number is None or 0 <= number < 2**63


@given(BODIES)
def test_no_body_makes_parse_task_raise(body: bytes) -> None:
    """Any bytes are a report that every store can keep, or they are unreadable."""
    report = parse_task(body)
    if report is not None:
        assert_fit(report)


@example(
    200,
    {},
    b'{"id": "task-unified-1", "status": "failed", "results": ["x"], "error": {"code": "c"}}',
)
@example(400, {}, b'{"error": {"code": "content_filter"}}')
@example(401, {"retry-after": "junk"}, b"")
@given(HTTP, st.dictionaries(st.sampled_from(["retry-after", "x-request-id"]), ANY), BODIES)
def test_every_response_to_a_submission_has_one_outcome(
    status: int, headers: dict[str, str], body: bytes
) -> None:
    """No response raises. Only 2xx with an id is accepted. Only 401, 403, 429 and 503 created
    nothing, and only 4xx is refused.
    """
    outcome = classify_submit(status, headers, body, 0.0)
    if isinstance(outcome, Accepted):
        assert 200 <= status < 300
        assert outcome.report.upstream_id
        assert_fit(outcome.report)
    elif isinstance(outcome, NotCreated):
        assert status in {401, 403, 429, 503}
        assert outcome.account is (status in {401, 403})
    elif isinstance(outcome, Refused):
        assert 400 <= status < 500
        assert status not in {401, 408, 429}
        assert all(isinstance(outcome.error[name], str) for name in ("code", "message", "type"))
    else:
        assert isinstance(outcome, Uncertain)


@given(HTTP, st.dictionaries(st.just("retry-after"), ANY), BODIES, ANY)
def test_no_response_to_a_query_raises(
    status: int, headers: dict[str, str], body: bytes, upstream_id: str
) -> None:
    """The requested id and the response may have any content."""
    classify_query(status, headers, body, 0.0, upstream_id)
