"""Links to stored images, which are made when a document is shown, and links of an upstream."""

import base64
import binascii
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from service.ids import EXTENSIONS, blob_name
from service.strict_json import JSON

MAX_LINK = 16 * 1024  # characters of a result's link, and of a redirect on the way to it
STORED = re.compile(r"data:sha256/[0-9a-f]{64}")
LINK = re.compile(r"https?:|data:", re.IGNORECASE)
# The WHATWG URL standard (section 4.4) removes C0 controls and blanks around a URL, and tabs and
# line ends everywhere in it, before it parses.
AROUND = "".join(map(chr, range(0x21)))
INSIDE = str.maketrans("", "", "\t\n\r")


def trimmed(url: str) -> str:
    return url.strip(AROUND).translate(INSIDE)


def usable(url: str) -> bool:
    """Whether a result's link can be fetched by its form."""
    return LINK.match(url) is not None and (len(url) <= MAX_LINK or is_data(url))


def is_data(url: str) -> bool:
    return url[:5].lower() == "data:"


def stored_form(url: str) -> str:
    """Of a result's link. A `data:` URL becomes a hash: the download asks the upstream again."""
    if not is_data(url) or STORED.fullmatch(url):
        return url
    return f"data:sha256/{hashlib.sha256(url.encode('utf-8', 'replace')).hexdigest()}"


def data_of(url: str) -> bytes:
    """The content of a `data:` URL (RFC 2397), as lenient as WHATWG. Raises ValueError."""
    head, comma, text = url.partition(",")
    if not comma:
        raise ValueError("the data: URL has no comma")
    content = unquote_to_bytes(text.partition("#")[0])
    if not head.rstrip().lower().endswith("base64"):
        return content
    content = content.translate(bytes.maketrans(b"-_", b"+/"), b" \t\n\f\r").rstrip(b"=")
    try:
        return base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError("the data: URL is not base64") from error


@dataclass(frozen=True, slots=True)
class Links:
    """`image_base_url` serves the blob store under the same names. None: the service does.

    `sign` makes the query that signs the link of an image, by its id. None: links live as long as
    their images.
    """

    base_url: str
    image_base_url: str | None = None
    sign: Callable[[str], str] | None = None

    def image_path(self, name: str) -> str:
        """Of an image's id, with or without the ending of a file's name."""
        query = self.sign(name.partition(".")[0]) if self.sign else ""
        return f"/images/{name}{query}"

    def image(self, task_id: str, image: JSON) -> str:
        if self.image_base_url is None:
            extension = EXTENSIONS.get(image["media_type"])
            name = f"{image['id']}.{extension}" if extension else image["id"]
            return self.base_url + self.image_path(name)
        blob = blob_name(task_id, image["index"], image["sha256"], image["media_type"])
        return f"{self.image_base_url}/{blob}"


def with_links(document: JSON, links: Links) -> JSON:
    """A task's document with links of its images, and with `results` if it is completed."""
    images = [{**image, "url": links.image(document["id"], image)} for image in document["images"]]
    results = [image["url"] for image in images] if document["state"] == "completed" else []
    return {**document, "images": images, "results": results}
