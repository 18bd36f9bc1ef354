"""The links of results, in every shape in which upstreams have sent them."""

from service.links import MAX_LINK, data_of, is_data, stored_form, trimmed, usable
from service.strict_json import JSON
from service.upstreams.lenient import document_of, text_of

RESULTS = 64  # links of a task
# Where links have been found, the documented place first, and their names inside an object. `url`
# and `image_url` beside the status may be something else, such as an input.
PLACES = ("results", "result_data", "result", "result_urls", "result_url", "output_url", "file_url")
NAMES = ("url", "image_url", *PLACES, "images", "image", "urls", "data")
DEPTH = 8  # of lists and objects around a link


def result_links(document: JSON) -> tuple[str, ...]:
    """The results in order. A result without a link becomes "", so that no image is missing without
    a trace. A `data:` URL becomes its short form.
    """
    return tuple(stored_form(link) for link in _whole_links(document))


def inline_content(document: JSON, link: str) -> bytes | None:
    """The content of the `data:` URL with this short form. None: it is not among the results.
    Raises ValueError if the URL has no content.
    """
    found = (each for each in _whole_links(document) if stored_form(each) == link)
    url = next(found, None)
    return None if url is None else data_of(url)


def _whole_links(document: JSON) -> list[str]:
    found = [links for place in PLACES if (links := _links_in(document.get(place)))]
    best = next((links for links in found if any(map(usable, links))), found[0] if found else [])
    return best[:RESULTS]


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
        numbered = [each for name, each in value.items() if name.isdecimal()]
        return _links_in(numbered, depth - 1)
    return _links_in_text(value, depth) if isinstance(value, str) else []


def _links_in_text(text: str, depth: int) -> list[str]:
    link = trimmed(text)
    if link[:1] in ("[", "{"):  # JSON in a text
        inner = document_of(b'{"results":%b}' % link.encode("utf-8", "replace"))
        return _links_in((inner or {}).get("results"), depth - 1)
    # A link that is too long stays too long when it is cut.
    link = text_of(link, len(link) if is_data(link) else MAX_LINK + 1) or ""
    return [link] if link else []
