"""The form of a submission: its fields by the catalogue, and the body that they make."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.errors import ApiError, invalid_request
from service.strict_json import JSON, read_object
from service.web.console.form_bodies import FormFields

RATIOS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))
CUSTOM, STEP = "custom", 8  # STEP: of a preset's sides, unless the model says otherwise
SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")
BOOLEANS = {"true": True, "false": False}
OWN_PLACE = ("prompt", "negative_prompt", "image_urls", "size", "n")  # in the template
METADATA = "metadata"
LABELS = {"prompt": "Prompt", "n": "Pictures", "prompt_extend": "Extend the prompt"}


@dataclass(slots=True)
class Draft:
    """The input of a person: texts by field, and the references in their order."""

    model: str
    texts: dict[str, str] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)

    @classmethod
    def of_form(cls, form: FormFields) -> "Draft":
        return cls(form.get("model"), dict(form.pairs), form.all("image"))

    @classmethod
    def of_task(cls, task: JSON) -> "Draft":
        """The request of an earlier task. Its data: URLs are no longer known."""
        request: JSON = {**task["request"], "prompt": task["prompt"] or ""}
        draft = cls(task["model"], {})
        for name, value in flat(request):
            draft.texts[name] = value if isinstance(value, str) else json.dumps(value)
        draft.texts[METADATA] = metadata_text(task["metadata"])
        size = SIZE.fullmatch(draft.texts.get("size", ""))
        if size:
            draft.texts |= {"width": size[1], "height": size[2]}
        named = request.get("image_urls") or []
        draft.images = [each for each in named if isinstance(each, str) and each[:5] != "data:"]
        return draft

    def move(self, index: int, by: int) -> None:
        if 0 <= index < len(self.images) and 0 <= index + by < len(self.images):
            self.images.insert(index + by, self.images.pop(index))


def flat(value: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a request by their dotted names, and its objects as a whole too."""
    for name, each in value.items():
        yield before + name, each
        if isinstance(each, Mapping):
            yield from flat(each, f"{before}{name}.")


def body_of(draft: Draft, document: JSON) -> JSON:
    """The submission. A field that has its default is left out. Raises ApiError with `param`."""
    body: JSON = {"model": draft.model}
    for name, rule in document["fields"].items():
        value = value_of(name, rule, draft)
        if value is None or (value == rule["default"] and name != "size"):
            continue
        parent = body
        *above, last = name.split(".")
        for each in above:
            parent = parent.setdefault(each, {})
        parent[last] = value
    if pairs := metadata_of(draft.texts.get(METADATA, "").strip()):
        body[METADATA] = pairs
    return body


def metadata_of(text: str) -> JSON:
    """`name=value` lines, or a JSON object for values with line ends. Raises ApiError."""
    if text.startswith("{"):
        return object_of(METADATA, text)
    pairs = {}
    for line in filter(None, map(str.strip, text.split("\n"))):
        name, equals, value = line.partition("=")
        if not equals:
            message = f"metadata must be lines such as order=7, not {line[:40]!r}"
            raise invalid_request(message, METADATA)
        pairs[name.strip()] = value.strip()
    return pairs


def metadata_text(pairs: Mapping[str, str]) -> str:
    """The text of which `metadata_of` makes these pairs again."""
    text = "\n".join(f"{name}={value}" for name, value in pairs.items())
    try:
        same = metadata_of(text) == pairs
    except ApiError:
        same = False
    return text if same else json.dumps(pairs, ensure_ascii=False)


def value_of(name: str, rule: JSON, draft: Draft) -> Any:
    text = draft.texts.get(name, "").strip()
    match rule["type"]:
        case "unsupported":
            return None
        case "images":
            return draft.images or None
        case "size":
            return size_of(draft)
        case _ if not text:
            return None
        case "boolean":
            return BOOLEANS.get(text)
        case "integer" | "number":
            return number_of(name, text, whole=rule["type"] == "integer")
        case "object":
            return object_of(name, text)
        case _:
            return text


def object_of(name: str, text: str) -> JSON:
    """Raises ApiError for text that is no JSON object."""
    try:
        return read_object(text.encode(), finite=True)
    except ValueError as error:
        raise invalid_request(f"{name} must be a JSON object: {error}", name) from None


def number_of(name: str, text: str, *, whole: bool) -> float:
    """Raises ApiError for any other text."""
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        kind = "a whole number" if whole else "a number"
        raise invalid_request(f"{name} must be {kind}, not {text[:40]!r}", name)
    return value


def size_of(draft: Draft) -> str | None:
    size = draft.texts.get("size", "").strip()
    if size != CUSTOM:
        return size or None
    sides = [draft.texts.get(name, "").strip() for name in ("width", "height")]
    return "x".join(sides) if any(sides) else None


def presets(sizes: JSON | None) -> list[tuple[str, str]]:
    """Sizes with labels: those of the model, then large ones of common ratios in its range."""
    if sizes is None:
        return []
    labels = {value: value for value in sizes["values"] or ()}
    if sizes["default"] and sizes["default"] not in labels:
        labels[sizes["default"]] = f"{sizes['default']} (default)".replace("x", " × ")
    if sizes["pixels"] is not None:
        low, high = sizes["pixels"]
        step = sizes["multiple"] or STEP
        for across, down in RATIOS:
            unit = math.isqrt(min(high, 1 << 22) * step * step // (across * down)) // step // step
            width, height = (max(1, unit) * step * side for side in (across, down))
            if low <= width * height <= high and within(sizes["side"], width, height):
                labels.setdefault(f"{width}x{height}", f"{across}:{down} · {width} × {height}")
    return list(labels.items())


def within(side: Sequence[int] | None, width: int, height: int) -> bool:
    return side is None or (side[0] <= min(width, height) and max(width, height) <= side[1])


def others(document: JSON) -> list[JSON]:
    """The fields without a place of their own."""
    return [
        {"name": name, "label": LABELS.get(name, name.replace("_", " ").capitalize()), **rule}
        for name, rule in document["fields"].items()
        if name not in OWN_PLACE and rule["type"] != "unsupported"
    ]


def field_of(error: ApiError, document: JSON) -> str:
    """The field that an error belongs to. Empty: none of the form's."""
    name = re.sub(r"\[\d+\].*", "", error.param or "")
    if name.partition(".")[0] == METADATA:
        return METADATA
    return name if name in document["fields"] or name == "model" else ""
