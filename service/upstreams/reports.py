"""Reports in the documents of an upstream, with the links of results in every shape in which
upstreams have sent them. A value that is missing or malformed is None.
"""

import re
from itertools import islice

from service.credits import millionths
from service.ids import UPSTREAM_ID
from service.links import data_of, stored_form, trimmed, usable
from service.strict_json import JSON, storable
from service.upstreams.base import Report, Status
from service.upstreams.lenient import (
    INLINE,
    INLINE_URLS,
    base64_link,
    document_of,
    inline_url,
    link_of,
    number_of,
    section_of,
    status_of,
    task_of,
    text_of,
)

MESSAGE, WORD = 2000, 64  # characters kept of a message and of a short word
# Seconds. A task is queried after twice its estimate, well within the day that EvoLink keeps it.
LONGEST_ESTIMATE = 6 * 3600
RESULTS = 64  # links of a task
# Where links have been found, the documented place first, and their names inside an object. `url`
# and `image_url` beside the status may be something else, such as an input.
PLACES = (
    *("results", "result_data", "result", "result_urls", "result_url", "output_url", "file_url"),
    *("data", "output", "images"),
)
NAMES = ("url", "image_url", *PLACES, "image", "urls", "uri", "link", "download_url")
BASE64 = ("b64_json", "base64")  # as `lenient.INLINE` has them
DEPTH = 8  # of lists and objects around a link


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


def result_links(document: JSON) -> tuple[str, ...]:
    """The results in order. A result without a link becomes "", so that no image is missing without
    a trace. A `data:` URL becomes its short form.
    """
    lists = [links for name in PLACES if (links := _links_in(document.get(name)))]
    best = next((links for links in lists if any(map(usable, links))), lists[0] if lists else [])
    return tuple(map(stored_form, best[:RESULTS]))


def inline_content(body: bytes, link: str) -> bytes | None:
    """The content of the `data:` URL with this short form in a document. None: it is not there.
    Raises ValueError if the URL has no content.
    """
    for match in islice(INLINE.finditer(body), INLINE_URLS):
        url = inline_url(match)
        if stored_form(url) == link:
            return data_of(url)
    return None


def _links_in(value: object, depth: int = DEPTH) -> list[str]:
    """The links in a text, in an object, or in a list of these. An entry of a list has at least
    one, which may be "".
    """
    if not depth or not value:
        return []
    if isinstance(value, list):
        entries = [_links_in(entry, depth - 1) or [""] for entry in value[:RESULTS]]
        return [link for links in entries for link in links]
    if isinstance(value, dict):
        for name in NAMES:
            if links := _links_in(value.get(name), depth - 1):
                return links
        for name in BASE64:
            if isinstance(text := value.get(name), str) and text:
                return [base64_link(text)]
        numbered = [each for name, each in value.items() if name.isdecimal()]
        return _links_in(numbered, depth - 1)
    return _links_in_text(value, depth) if isinstance(value, str) else []


def _links_in_text(text: str, depth: int) -> list[str]:
    link = trimmed(text)
    if link[:1] in ("[", "{"):  # JSON in a text
        inner = document_of(b'{"results":%b}' % link.encode("utf-8", "replace"))
        return _links_in((inner or {}).get("results"), depth - 1)
    link = link_of(link)
    return [link] if link else []
