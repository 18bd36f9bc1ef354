"""The links of results, in every shape in which upstreams have sent them."""

from itertools import islice

from service.links import data_of, stored_form, trimmed, usable
from service.strict_json import JSON
from service.upstreams.lenient import (
    INLINE,
    INLINE_URLS,
    base64_link,
    document_of,
    inline_url,
    link_of,
)

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


def result_links(document: JSON) -> tuple[str, ...]:
    """The results in order. A result without a link becomes "", so that no image is missing without
    a trace. A `data:` URL becomes its short form.
    """
    found = [links for place in PLACES if (links := _links_in(document.get(place)))]
    best = next((links for links in found if any(map(usable, links))), found[0] if found else [])
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
