"""The parsing of EvoLink's responses and callbacks, and the outcome that each of them proves."""

import json
from typing import Any

import pytest

from service.errors import CallTimedOut, ConnectionLost, EgressError, EgressRefused, NotConnected
from service.upstreams.base import (
    Accepted,
    Found,
    NoAnswer,
    NotCreated,
    NotFound,
    Refused,
    Report,
    Status,
    SubmitOutcome,
    Uncertain,
)
from service.upstreams.reports import parse_task
from service.upstreams.verdicts import classify_query, classify_submit, unanswered_submit

NOW = 784_111_777.0  # Sun, 06 Nov 1994 08:49:37 GMT
ID = "task-unified-1757165031-uyujaw3d"
SUBMITTED = {
    "created": 1757165031,
    "id": ID,
    "model": "wan2.5-text-to-image",
    "object": "image.generation.task",
    "progress": 0,
    "status": "pending",
    "type": "image",
    "task_info": {"can_cancel": True, "estimated_time": 45},
    "usage": {"billing_rule": "per_call", "credits_reserved": 1, "user_group": "default"},
}
PAGE = (
    b"<!DOCTYPE html><html><head><title>502 Bad Gateway</title></head><body>"
    + b"<p>x</p>" * 500
    + b"</body></html>"
)


def body(document: object) -> bytes:
    return json.dumps(document).encode()


def task(**fields: object) -> Report:
    report = parse_task(body({"id": ID, "status": "processing", **fields}))
    assert report is not None
    return report


def submit(status: int, document: object = None, retry_after: str | None = None) -> SubmitOutcome:
    headers = {} if retry_after is None else {"retry-after": retry_after}
    return classify_submit(status, headers, PAGE if document is None else body(document), NOW)


def error(code: object, **fields: object) -> dict[str, Any]:
    return {"error": {"code": code, "message": "m", "type": "t", **fields}}


# --- reading
# --------------------------------------------------------------------------------------------------


def test_every_field_of_the_documented_response_is_read() -> None:
    """Credits are millionths."""
    assert parse_task(body(SUBMITTED)) == Report(
        upstream_id=ID,
        status=Status.PENDING,
        progress=0,
        can_cancel=True,
        estimated_time=45,
        billing_rule="per_call",
        user_group="default",
        credits_reserved=1_000_000,
    )


def test_a_status_alone_is_readable() -> None:
    """A failed task's body may lack everything else, and a callback may lack its id."""
    assert parse_task(b'{"status": "failed"}') == Report(status=Status.FAILED)


@pytest.mark.parametrize(
    ("word", "status"),
    [
        ("pending", Status.PENDING),
        ("processing", Status.PROCESSING),
        ("completed", Status.COMPLETED),
        ("failed", Status.FAILED),
        ("cancelled", Status.CANCELLED),
        ("canceled", Status.CANCELLED),
        ("COMPLETED", Status.COMPLETED),
        ("Canceled", Status.CANCELLED),
        ("queued", None),
        ("", None),
        (" completed\n", Status.COMPLETED),
    ],
)
def test_each_spelling_of_a_status_is_one_status(word: str, status: Status | None) -> None:
    """Both spellings are accepted in any case. An undocumented status is not terminal."""
    report = task(status=word)
    assert report.status is status
    assert report.final is (status in {Status.COMPLETED, Status.FAILED, Status.CANCELLED})


def test_failed_by_request_cancelled_is_cancelled() -> None:
    """The upstream has two forms of a cancellation. Any other code is a failure."""
    assert task(status="failed", error={"code": "request_cancelled"}).status is Status.CANCELLED
    assert task(status="failed", error={"code": "service_error"}).status is Status.FAILED
    assert (
        task(status="processing", error={"code": "request_cancelled"}).status is Status.PROCESSING
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"results": ["http://a/1", "https://b/2"]},
        {"results": [{"url": "http://a/1"}, {"url": "https://b/2"}]},
        {"results": [{"image_url": "http://a/1"}, "https://b/2"]},
        {"result_data": [{"image_url": "http://a/1"}, {"image_url": "https://b/2"}]},
        {"results": [], "result_data": [{"url": "http://a/1"}, {"image_url": "https://b/2"}]},
        {"results": [None], "result_data": [{"url": "http://a/1"}, {"image_url": "https://b/2"}]},
        {"results": [["http://a/1"], ["https://b/2"]]},
        {"results": [["http://a/1", "https://b/2"]]},
        {"results": {"0": "http://a/1", "1": "https://b/2"}},
        {"results": {"images": [{"url": "http://a/1"}, {"image": {"url": "https://b/2"}}]}},
        {"results": '["http://a/1", "https://b/2"]'},
        {"results": '{"resultUrls": [], "urls": ["http://a/1", "https://b/2"]}'},
        {"results": ["http://a/1\n", " https:/\t/b/2\u0000"]},
        {"result": ["http://a/1", "https://b/2"]},
        {"results": None, "result_urls": ["http://a/1", "https://b/2"]},
    ],
)
def test_every_form_of_results_is_read_alike(fields: dict[str, object]) -> None:
    """The forms are texts, objects with `url`, and `result_data` with `image_url`, in the
    upstream's order.
    """
    assert task(status="completed", **fields).results == ("http://a/1", "https://b/2")


@pytest.mark.parametrize("results", [None, {}, "", " ", 7, [], {"url": None}, {"url": 7}, "[]"])
def test_results_without_any_link_are_empty(results: object) -> None:
    """The caller decides about a completed task without results."""
    assert task(status="completed", results=results).results == ()


@pytest.mark.parametrize(
    "fields",
    [
        {"results": "https://a/1"},
        {"results": {"url": "https://a/1"}},
        {"results": {"image": {"url": "https://a/1"}}},
        {"result": {"image_url": "https://a/1"}},
        {"result_data": {"url": "https://a/1"}},
        {"result_url": "https://a/1"},
        {"output_url": "https://a/1"},
        {"file_url": "https://a/1"},
    ],
)
def test_one_result_may_come_without_a_list(fields: dict[str, object]) -> None:
    assert task(status="completed", **fields).results == ("https://a/1",)


def test_an_input_beside_the_status_is_no_result() -> None:
    """An upstream may repeat the request, and a thumbnail is not the image."""
    fields: dict[str, Any] = {"image_url": "https://a/input", "url": "https://a/task"}
    fields["results"] = [{"thumbnail": "https://a/small"}]
    assert task(status="completed", **fields).results == ("",)


def test_a_result_that_is_no_link_keeps_its_place() -> None:
    """It is reported as lost later, instead of vanishing."""
    assert task(results=["https://a/1", 7, None, {"url": 7}, {}, []]).results == (
        "https://a/1",
        "",
        "",
        "",
        "",
        "",
    )


def test_texts_and_lists_are_cut() -> None:
    """A careless or hostile response does not fill the store."""
    report = task(
        status="failed",
        results=["https://a/x"] * 100,
        error={"code": "c" * 999, "message": "m" * 9999, "type": "t" * 999},
        model="m" * 999,
        usage={"billing_rule": "b" * 999, "user_group": "u" * 999},
    )
    assert len(report.results) == 64
    assert report.error is not None
    assert {name: len(text) for name, text in report.error.items()} == {
        "code": 200,
        "message": 2000,
        "type": 200,
    }
    assert [len(text or "") for text in (report.billing_rule, report.user_group)] == [64, 64], (
        "the length of their columns"
    )


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (
            {"code": "x", "message": "m", "type": "task_error"},
            {"code": "x", "message": "m", "type": "task_error"},
        ),
        ({"code": "x"}, {"code": "x", "message": "x", "type": "task_error"}),
        ({"code": 500, "message": "m"}, {"code": "500", "message": "m", "type": "task_error"}),
        (
            {"code": True, "message": ["m"]},
            {"code": "unknown_error", "message": "unknown_error", "type": "task_error"},
        ),
        ("boom", {"code": "unknown_error", "message": "boom", "type": "task_error"}),
        ({}, None),
        (None, None),
        ("", {"code": "unknown_error", "message": "unknown_error", "type": "task_error"}),
        ([], None),
    ],
)
def test_a_tasks_error_is_all_text(given: object, read: object) -> None:
    """`code` may be an integer, and `type` may be missing."""
    assert task(status="failed", error=given).error == read


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (0, 0),
        (45, 45),
        (45.9, 45),
        (-5, 0),
        (250, 100),
        (1e400, 100),
        (-1e400, 0),
        ("50", None),
        (True, None),
        (None, None),
    ],
)
def test_progress_lies_between_0_and_100(given: object, read: int | None) -> None:
    """Clients see it as it is."""
    report = parse_task(
        json.dumps({"status": "pending", "progress": given}).replace("Infinity", "1e400").encode()
    )
    assert report is not None
    assert report.progress == read


@pytest.mark.parametrize("value", [-1, 10**30, True, "1", None, [], 1e400])
def test_impossible_numbers_count_as_unknown(value: object) -> None:
    fields = {
        "status": "pending",
        "created": value,
        "task_info": {"estimated_time": value, "can_cancel": "yes"},
    }
    report = parse_task(json.dumps(fields).replace("Infinity", "1e400").encode())
    assert report == Report(status=Status.PENDING)


def test_an_estimate_is_believed_up_to_six_hours() -> None:
    """The first query waits for twice the estimate, which must be shorter than the upstream's
    retention.
    """
    assert task(task_info={"estimated_time": 21600}).estimated_time == 21600
    assert task(task_info={"estimated_time": 21601}).estimated_time is None
    assert task(task_info={"estimated_time": 45.5}).estimated_time == 45


@pytest.mark.parametrize(
    ("given", "read"),
    [(8.7, 8_700_000), (0.05, 50_000), ("1.5", 1_500_000), (-1, None), (True, None), ([], None)],
)
def test_credits_are_millionths(given: object, read: int | None) -> None:
    """Decimals are exact, and a malformed value is unknown."""
    report = task(usage={"credits_reserved": given, "credits_used": given})
    assert (report.credits_reserved, report.credits_used) == (read, read)


@pytest.mark.parametrize("section", [None, [], "x", 7])
def test_a_section_that_is_no_object_is_empty(section: object) -> None:
    """Only the status is required."""
    assert task(usage=section, task_info=section) == Report(
        upstream_id=ID, status=Status.PROCESSING
    )


@pytest.mark.parametrize("id", [7, [7], {"x": 1}, "a b", "é", ".", "..", "x" * 201])
def test_an_id_that_no_query_can_use_is_unreadable(id: object) -> None:
    """A cut or repaired id could be another task's."""
    assert parse_task(body({"id": id, "status": "completed"})) is None


UNREADABLE = [
    *(
        b"",
        b" ",
        b"null",
        b"[]",
        b'"x"',
        b"7",
        b"{",
        b"{}",
        b'{"status": null}',
        b'{"status": 7}',
        b'{"id": "x"}',
        b"\xff\xfe{",
        PAGE,
    ),
    *(b'{"status": "failed", "status": "completed"}', b'{"status": "completed"'),
    '{"status": "completed"}'.encode("utf-16"),
    *(b'{"x": ' * 100_000, b"[" * 100_000, b"[" * 50_000 + b"]" * 50_000),
    b'{"x": ' + b"[" * 50_000 + b"]" * 49_999 + b', "status": "completed"}',
]


@pytest.mark.parametrize("data", UNREADABLE, ids=range(len(UNREADABLE)))
def test_a_body_without_one_status_is_unreadable(data: bytes) -> None:
    """No object, no status, two statuses or brackets without end: the body is unreadable, and the
    parser raises nothing.
    """
    assert parse_task(data) is None


UNUSABLE = [
    b'"x": NaN',
    b'"x": [-Infinity, Infinity]',
    b'"x": 1e999',
    b'"x": ' + b"9" * 5000,
    b'"x": "\\u0000"',
    b'"x": "\0"',
    b'"x": "two\nlines"',
    b'"x": [["\\ud800"]]',
    b'"\\udfff": "\\u0000"',
    b'"x": "\xed\xa0\x80"',
    b'"x": "caf\xe9"',
    b'"x": "C:\\pictures\\new"',
    b'"x": "cut \\ud8"',
    b'"x": 1, "x": 2',
    b'"x": {"y": 1, "y": [], "y": 1}',
    b'"error": {"code": "\\ud83d", "code": 2}',
    b'"x": ' + b"[" * 300 + b"]" * 300,
    b'"x": ' + b"[" * 5_000 + b"]" * 5_000,
    b'"x": ' + b'{"id": [{"x": ' * 2_000 + b"1" + b"}]}" * 2_000,
    b'"usage": ' + b"[" * 50_000 + b"]" * 50_000,
    b'"x": "' + b"[" * 5_000 + b'", "y": ' + b"[ " * 5_000 + b"{}" + b" ]" * 5_000,
    b'"x": [' + b"1, " * 600_000 + b"1]",
    b'"x": ["' + b'line", "' * 200_000 + b'"]',
    b'"x": "' + b"\\n" * 600_000 + b'"',
    b'"error": {"message": "' + b"x" * 1_200_000 + b'"}',
    b'"result_data": [{"b64_json": "' + b"A" * 1_200_000 + b'", "x": [' + b"{}, " * 9 + b"1]}]",
    b'"progress": NaN, "usage": NaN, "task_info": "\\ud83d", "error": "\\ud83d"',
]


@pytest.mark.parametrize("part", UNUSABLE, ids=range(len(UNUSABLE)))
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_an_unusable_part_costs_nothing_else(part: bytes, mark: bytes) -> None:
    """A paid result counts although no parser of JSON would take a part that nobody needs."""
    data = mark + b'{%b, "id": "%b", "status": "completed", "results": ["https://a/1"]}'
    report = parse_task(data % (part, ID.encode()))
    assert report is not None
    assert (report.upstream_id, report.status) == (ID, Status.COMPLETED)
    assert report.results == ("https://a/1",)
    assert isinstance(classify_submit(200, {}, data % (part, ID.encode()), NOW), Accepted)


@pytest.mark.parametrize(
    "rest", [b"\0\0", b"<!-- proxy -->", b"\r\n0\r\n", b";", b"}", b"\xff", b"null"]
)
def test_bytes_behind_the_object_cost_nothing(rest: bytes) -> None:
    """A gateway may add them to every response."""
    report = parse_task(b'{"status": "completed", "results": ["https://a/1"]}' + rest)
    assert report is not None
    assert report.results == ("https://a/1",)


def test_what_a_report_keeps_can_be_stored() -> None:
    """U+FFFD replaces the characters that databases reject."""
    report = task(status="failed", error={"code": "a\0b", "message": "cut \ud83d"}, results=["h\0"])
    assert report.error == {"code": "a\ufffdb", "message": "cut \ufffd", "type": "task_error"}


LONG = "https://a/" + "x" * 7000


def test_a_link_is_never_cut_and_then_judged() -> None:
    """A link has up to 16 KiB. A longer one stays recognisable as too long."""
    report = task(status="completed", results=[LONG, "https://a/" + "x" * 99_000])
    assert report.results[0] == LONG
    assert len(report.results[1]) == 16 * 1024 + 1
    assert report.incomplete


@pytest.mark.parametrize(
    ("results", "incomplete"),
    [
        ([], True),
        ([""], True),
        (["no link"], True),
        (["https://a/1", None], True),
        (["ftp://a/1"], True),
        (["HTTPS://a/1", "http:/a", "Data:image/png;base64,AAAA"], False),
    ],
)
def test_a_completed_task_wants_a_link_for_each_result(
    results: list[Any], incomplete: bool
) -> None:
    assert task(status="completed", results=results).incomplete is incomplete
    assert not task(status="failed", results=results).incomplete


def test_text_beyond_ascii_is_kept() -> None:
    """A surrogate pair is one character, not two lone surrogates."""
    assert task(error={"code": "x", "message": "雪\U0001f4a5"}).error == {
        "code": "x",
        "message": "雪\U0001f4a5",
        "type": "task_error",
    }


# --- the outcome of a submission


@pytest.mark.parametrize("status", [200, 201, 202])
def test_2xx_with_an_id_is_accepted(status: int) -> None:
    """The documented status is 200. Other statuses of the class prove the same."""
    outcome = submit(status, SUBMITTED)
    assert isinstance(outcome, Accepted)
    assert outcome.report.upstream_id == ID


def test_an_id_without_a_status_is_accepted_too() -> None:
    """The id proves that the task exists."""
    assert submit(200, {"id": ID}) == Accepted(Report(upstream_id=ID))


@pytest.mark.parametrize(
    ("retry_after", "wait"),
    [(None, None), ("7", 7.0), ("Sun, 06 Nov 1994 08:50:37 GMT", 60.0), ("junk", None)],
)
def test_429_created_nothing(retry_after: str | None, wait: float | None) -> None:
    """The upstream or a gateway sends it instead of creating a task. `Retry-After` is kept."""
    assert submit(429, error("rate_limit_exceeded"), retry_after) == NotCreated(
        "429 rate_limit_exceeded", wait, throttled=True
    )
    assert submit(429, None, retry_after) == NotCreated(
        "429 without an error of its own", wait, throttled=True
    )


def test_503_created_nothing_only_with_the_upstreams_own_json_error() -> None:
    """A gateway's page may replace a response with another meaning."""
    assert submit(503, error("service_unavailable"), "30") == NotCreated(
        "503 service_unavailable", 30.0
    )
    assert submit(503, error(503)) == NotCreated("503 503")
    assert submit(503, {"error": {"message": "busy"}}) == NotCreated("503 busy")
    pages: list[object] = [
        None,
        {},
        {"error": "busy"},
        {"error": {}},
        {"error": {"x": 1}},
        {"message": "Service Unavailable"},
        [],
    ]
    for document in pages:
        assert submit(503, document) == Uncertain("503 without an error of its own")


@pytest.mark.parametrize(
    ("status", "code"),
    [
        *((401, code) for code in ("unauthorized", "key_disabled", "permission_denied", 401)),
        *(
            (403, code)
            for code in (
                "key_disabled",
                "key_expired",
                "key_quota_exhausted",
                "user_disabled",
                "ip_restricted",
            )
        ),
    ],
)
def test_a_refusal_of_our_key_or_account_created_nothing(status: int, code: object) -> None:
    """The task is not at fault. It is retried, and an alert is raised."""
    assert submit(status, error(code)) == NotCreated(f"{status} {code}", account=True)


def test_401_created_nothing_with_any_body() -> None:
    """Any server that answers 401 let no request in."""
    assert submit(401) == NotCreated("401 without an error of its own", account=True)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        *(
            (400, code)
            for code in (
                "invalid_request",
                "invalid_parameters",
                "content_filter",
                "sensitive_content",
                "moderation_blocked",
            )
        ),
        *((402, code) for code in ("insufficient_quota", "quota_exceeded")),
        *((403, code) for code in ("model_access_denied", "permission_denied", "unknown_code")),
        *((404, "model_not_found"), (413, "request_too_large"), (422, "invalid_parameter")),
        *((status, "x") for status in (405, 409, 415, 451)),
    ],
)
def test_other_4xx_refuse_the_request(status: int, code: str) -> None:
    """The client gets the upstream's status and error."""
    refusal = submit(status, error(code, param="size"))
    assert refusal == Refused(status, {"code": code, "message": "m", "type": "t", "param": "size"})


@pytest.mark.parametrize(
    ("status", "code", "type"),
    [
        (400, "invalid_request", "invalid_request_error"),
        (402, "insufficient_quota", "insufficient_quota_error"),
        (403, "permission_denied", "permission_error"),
        (404, "not_found", "not_found_error"),
        (413, "request_too_large", "invalid_request_error"),
        (422, "invalid_request", "invalid_request_error"),
    ],
)
def test_an_integer_code_falls_back_to_the_class_of_its_status(
    status: int, code: str, type: str
) -> None:
    """Older pages of the upstream use the status as the code. Clients see one form."""
    assert submit(status, {"error": {"code": status, "message": "m"}}) == Refused(
        status, {"code": code, "message": "m", "type": type, "param": None}
    )


def test_a_refusal_without_a_message_gets_one() -> None:
    """Clients never see a gateway's page. An integer code that is not the status is kept."""
    message = "the upstream refused the request with status 404"
    assert submit(404) == Refused(
        404, {"code": "not_found", "message": message, "type": "not_found_error", "param": None}
    )
    kept = submit(400, {"error": {"code": 40013, "message": "m" * 9999, "type": 7, "param": ["n"]}})
    assert kept == Refused(
        400,
        {"code": "40013", "message": "m" * 2000, "type": "invalid_request_error", "param": None},
    )


@pytest.mark.parametrize("status", [400, 402, 403, 409, 429, 500, 502, 503])
@pytest.mark.parametrize("code", ["paid_outcome_unknown", "idempotency_conflict"])
def test_two_codes_prove_nothing_with_any_status(status: int, code: str) -> None:
    """The task may have been charged."""
    assert submit(status, error(code)) == Uncertain(f"{status} {code}")


@pytest.mark.parametrize(
    "status", [100, 199, 300, 301, 302, 307, 308, 399, 408, 500, 501, 502, 504, 520, 524, 599, 600]
)
@pytest.mark.parametrize(
    "document", [None, error("upstream_error"), error("service_error"), SUBMITTED]
)
def test_everything_else_is_uncertain(status: int, document: object) -> None:
    """This holds for 3xx, 408 and other 5xx, with the upstream's JSON, with a gateway's page, and
    even with an id.
    """
    assert isinstance(submit(status, document), Uncertain)


@pytest.mark.parametrize("more", [{}, {"status": "pending"}, {"progress": 3}])
def test_a_task_id_is_taken_for_the_id(more: dict[str, object]) -> None:
    """If both are given, `id` counts."""
    for document in (
        {"task_id": "task-unified-1", **more},
        {"id": "task-unified-1", "task_id": "other", **more},
    ):
        outcome = submit(200, document)
        assert isinstance(outcome, Accepted)
        assert outcome.report.upstream_id == "task-unified-1"


@pytest.mark.parametrize(
    "document", [None, {}, [], {"id": None, "status": "pending"}, {"id": ""}, {"id": 7}, error("x")]
)
def test_2xx_without_an_id_is_uncertain(document: object) -> None:
    """A page with 200 neither proves nor disproves a task."""
    assert submit(200, document) == Uncertain("200 without an id")


def test_a_403_page_is_uncertain() -> None:
    """A gateway's page is neither about the model nor about our key."""
    assert submit(403) == Uncertain("403 without an error of its own")


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        (EgressRefused("x"), NotCreated("refused by the guard")),
        (NotConnected("x"), NotCreated("not connected")),
        (CallTimedOut("x"), Uncertain("timed out")),
        (ConnectionLost("x"), Uncertain("connection lost")),
        (EgressError("x"), Uncertain("connection lost")),
    ],
)
def test_without_a_response_only_an_unsent_request_created_nothing(
    fault: EgressError, outcome: SubmitOutcome
) -> None:
    """DNS, a refused connection, TLS and the guard: no request left. Any other request may have
    arrived.
    """
    assert unanswered_submit(fault) == outcome


# --- the answer to a query


def test_a_readable_answer_is_found() -> None:
    """It has the requested id, or no id."""
    assert classify_query(200, {}, body(SUBMITTED), NOW, ID) == Found(task(**SUBMITTED))
    assert classify_query(200, {}, b'{"status": "failed"}', NOW, ID) == Found(
        Report(status=Status.FAILED)
    )


def test_resource_not_found_is_a_failed_task() -> None:
    """The upstream found the task and says that its result is gone."""
    answer = {
        "id": ID,
        "status": "failed",
        "error": {"code": "resource_not_found", "message": "gone"},
    }
    outcome = classify_query(200, {}, body(answer), NOW, ID)
    assert isinstance(outcome, Found)
    assert outcome.report.status is Status.FAILED
    assert outcome.report.error == {
        "code": "resource_not_found",
        "message": "gone",
        "type": "task_error",
    }


@pytest.mark.parametrize("page", [PAGE, body(error("task_not_found"))])
def test_404_is_not_found(page: bytes) -> None:
    """Another query follows, because one response does not decide what a 404 means."""
    assert classify_query(404, {}, page, NOW, ID) == NotFound()


def test_an_answer_about_another_task_is_no_answer() -> None:
    """Another task's images would be worse than none."""
    assert classify_query(
        200, {}, body({"id": "task-unified-other", "status": "completed"}), NOW, ID
    ) == NoAnswer("200 for another task")


@pytest.mark.parametrize("status", [301, 400, 401, 403, 408, 429, 500, 502, 503, 524])
def test_other_statuses_are_no_answer(status: int) -> None:
    """The body does not matter. `Retry-After` is kept."""
    throttled = status == 429
    assert classify_query(status, {"retry-after": "9"}, body(SUBMITTED), NOW, ID) == NoAnswer(
        f"{status}", 9.0, throttled
    )
    assert classify_query(status, {}, PAGE, NOW, ID) == NoAnswer(f"{status}", throttled=throttled)


def test_a_page_with_200_is_no_answer() -> None:
    """An unreadable response is neither found nor not found."""
    assert classify_query(200, {}, PAGE, NOW, ID) == NoAnswer("200 unreadable")
