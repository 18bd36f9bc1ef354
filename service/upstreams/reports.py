"""Reports in the documents of an upstream. A value that is missing or malformed is None."""

import re

from service.credits import millionths
from service.ids import UPSTREAM_ID
from service.strict_json import JSON, storable
from service.upstreams.base import Report, Status
from service.upstreams.lenient import number_of, section_of, status_of, task_of, text_of
from service.upstreams.result_links import result_links

MESSAGE, WORD = 2000, 64  # characters kept of a message and of a short word
# Seconds. A task is queried after twice its estimate, well within the day that EvoLink keeps it.
LONGEST_ESTIMATE = 6 * 3600


def code_of(value: object) -> str | None:
    """A code as text. Older pages give an integer."""
    return str(value)[:200] if type(value) is int else text_of(value)


def _percent(value: object) -> int | None:
    number = number_of(value)
    return None if number is None else int(min(max(number, 0), 100))


def _estimate(value: object) -> int | None:
    seconds = number_of(value)
    return int(seconds) if seconds is not None and 0 <= seconds < LONGEST_ESTIMATE + 1 else None


def _error(document: JSON) -> JSON | None:
    """A failed task's error: `code`, `message`, `type`."""
    error = document.get("error")
    if isinstance(error, str):
        error = {"message": error}
    if not isinstance(error, dict) or not error:
        return None
    code = code_of(error.get("code")) or "unknown_error"
    return {
        "code": code,
        "message": text_of(error.get("message"), MESSAGE) or code,
        "type": text_of(error.get("type")) or "task_error",
    }


def report_of(document: JSON) -> Report | None:
    """None: its id is malformed."""
    id = document.get("task_id" if document.get("id") in (None, "") else "id")
    id = id.strip() if isinstance(id, str) else id
    status, error = status_of(document), _error(document)
    if id is not None and not (isinstance(id, str) and re.fullmatch(UPSTREAM_ID, id)):
        return None
    if status is Status.FAILED and error is not None and error["code"] == "request_cancelled":
        status = Status.CANCELLED
    info, usage = section_of(document, "task_info"), section_of(document, "usage")
    return Report(
        upstream_id=id,
        status=status,
        results=result_links(document),
        error=error,
        progress=_percent(document.get("progress")),
        can_cancel=info["can_cancel"] if isinstance(info.get("can_cancel"), bool) else None,
        estimated_time=_estimate(info.get("estimated_time")),
        billing_rule=text_of(usage.get("billing_rule"), WORD),
        user_group=text_of(usage.get("user_group"), WORD),
        credits_reserved=millionths(usage.get("credits_reserved")),
        credits_used=millionths(usage.get("credits_used")),
        credits_refunded=millionths(section_of(document, "billing").get("refunded_credits")),
    )


def parse_task(body: bytes) -> Report | None:
    """A task in a callback, with a status. None: unreadable, as are several objects, because the
    upstream can be asked.
    """
    document = task_of(body, alone=True)
    word = document.get("status") if document else None
    if document is None or not isinstance(word, str) or storable(word) != word:
        return None
    return report_of(document)
