"""Values below, at and above each limit of the catalogue, made from the catalogue's own data. A new
model or a new limit needs no new test.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import isqrt
from typing import Any

from service.upstreams.catalogue_entry import ModelEntry, value_at
from service.upstreams.catalogue_fields import (
    FieldRule,
    FlagField,
    ImagesField,
    NumberField,
    ObjectField,
    SizeField,
    TextField,
    UnsupportedField,
)

JSON = dict[str, Any]
LINK = "https://example.com/1.png"
# Keys of a rule that are no limits of a submission. Those of IMAGE_LIMITS hold for each image.
NO_LIMITS = {"type", "default", "unit", "source", "note"}
IMAGE_LIMITS = ("formats", "alpha", "max_bytes", "min_side", "max_side", "max_pixels", "aspect")


@dataclass(frozen=True)
class Edge:
    """Values at a limit: accepted ones next to it, and refused ones beyond it."""

    limit: str
    accepted: list[Any] = field(default_factory=list)
    refused: list[Any] = field(default_factory=list)


def set_limits(rule: FieldRule) -> set[str]:
    """The names of the limits that a rule has."""
    given = {name for name in type(rule).model_fields if getattr(rule, name) is not None}
    given -= NO_LIMITS if not isinstance(rule, ImagesField) else {*NO_LIMITS, *IMAGE_LIMITS}
    if not rule.required:
        given.discard("required")
    if getattr(rule, "min", None) == 0 and not isinstance(rule, NumberField):
        given.discard("min")  # of a length or a count
    return given or {"type"}


def edges(rule: FieldRule) -> Iterator[Edge]:
    """The edges of a field's values."""
    match rule:
        case TextField():
            yield from lengths(rule, lambda n: ("x " if rule.unit == "tokens" else "x") * n)
            yield Edge("type", refused=[7, ["x"], {}])
        case NumberField():
            yield from lengths(rule, lambda n: n)
            if rule.with_images is not None:
                yield Edge("with_images", [1], [rule.with_images + 1])
            yield Edge("type", refused=["2", True, [1]])
        case ImagesField():
            yield from lengths(rule, lambda n: [LINK] * n)
            yield Edge("type", refused=[LINK, [7] * (rule.min or 1), [""] * (rule.min or 1), {}])
        case FlagField():
            yield Edge("type", [True, False], ["true", 1, []])
        case ObjectField():
            yield Edge("type", refused=[7, "x", []])
        case UnsupportedField():
            yield Edge("type", refused=["x", 0, False, []])
        case SizeField():
            yield Edge("type", refused=[1024, "1024*1024", "1024", ["1024x1024"]])
            yield from size_edges(rule)


def lengths(rule: TextField | NumberField | ImagesField, made: Callable[[int], Any]) -> list[Edge]:
    values: list[Any] | None = getattr(rule, "values", None)
    if values is not None:
        beyond = [max(values) + 1, min(values) - 1] if isinstance(values[0], int) else ["x", ""]
        return [Edge("values", list(values), beyond)]
    low, high, found = rule.min, None if "max" not in set_limits(rule) else rule.max, []
    if low and (isinstance(rule, NumberField) or low > 0):
        inside = [low + 1] if high is None or low < high else []
        found.append(Edge("min", [made(n) for n in (low, *inside)], [made(low - 1)]))
    elif isinstance(rule, NumberField) and low is not None:
        found.append(Edge("min", [low, low + 1], [low - 1]))
    if high is not None:
        inside = [high - 1] if high > (low or 0) else []
        found.append(Edge("max", [made(n) for n in (high, *inside)], [made(high + 1)]))
    return found


# --- sizes


def size_edges(rule: SizeField) -> Iterator[Edge]:
    step = rule.multiple or 1
    if rule.values:
        yield Edge("values", list(rule.values), ["7:5", rule.values[0] + "x"])
    if rule.pixels:
        low, high = rule.pixels
        accepted = [area(rule, low, 1), area(rule, high, -1)]
        yield Edge(
            "pixels", named(accepted), named([area(rule, low - 1, -1), area(rule, high + 1, 1)])
        )
    if rule.side:
        low, high = rule.side
        accepted = [beside(rule, side, {"side"}) for side in (low, high)]
        refused = [beside(rule, side, {"side"}) for side in (low - step, high + step)]
        yield Edge("side", named(accepted), named(refused))
    if rule.aspect:
        accepted = [shaped(rule, 0), shaped(rule, -step)]
        yield Edge("aspect", named(accepted), named([shaped(rule, step)]))
    if rule.multiple:
        side = step * (1024 // step)
        yield Edge("multiple", [f"{side}x{side}"], [f"{side}x{side + 1}", f"{side - 1}x{side}"])


Sides = tuple[int, int]


def named(sizes: list[Sides | None]) -> list[str]:
    """Sizes both ways round. A limit that the others leave no room for has none."""
    found = [size for size in sizes if size is not None]
    return [f"{w}x{h}" for w, h in found] + [f"{h}x{w}" for w, h in found if h != w]


def fits(rule: SizeField, sides: Sides, without: set[str]) -> bool:
    """Whether the sides are within the other limits."""
    short, long = min(sides), max(sides)
    side, aspect = rule.side, rule.aspect
    return (
        short > 0
        and ("side" in without or side is None or (side[0] <= short and long <= side[1]))
        and ("aspect" in without or aspect is None or long <= aspect * short)
        and ("pixels" in without or rule.pixels is None or within(short * long, rule.pixels))
    )


def within(number: int, limits: Sides) -> bool:
    return limits[0] <= number <= limits[1]


def area(rule: SizeField, pixels: int, way: int) -> Sides | None:
    """The sides whose total is the nearest to `pixels`, from there on downwards or upwards."""
    step, best = rule.multiple or 1, None
    for short in range(step, isqrt(pixels) + step + 1, step):
        lines = pixels // short if way < 0 else -(-pixels // short)
        long = lines // step * step if way < 0 else -(-lines // step) * step
        if not fits(rule, (short, long), {"pixels"}):
            continue
        if best is None or abs(short * long - pixels) < abs(best[0] * best[1] - pixels):
            best = short, long
    return best


def beside(rule: SizeField, side: int, without: set[str]) -> Sides | None:
    """Sides of which one is given."""
    step = rule.multiple or 1
    others = [min(rule.side[1], side), *range(step, 8 * side, step)] if rule.side else []
    return next((size for other in others if fits(rule, size := (side, other), without)), None)


def shaped(rule: SizeField, more: int) -> Sides | None:
    """Sides in the longest aspect, and so many pixels longer."""
    step, aspect = rule.multiple or 1, rule.aspect or 1
    sizes = ((short, short * aspect + more) for short in range(step, 8192, step))
    return next((size for size in sizes if fits(rule, size, {"aspect"})), None)


# --- bodies


def placed(entry: ModelEntry, model: str, name: str, value: Any) -> JSON:
    """The example of a model with another value of a field."""
    body: JSON = entry.example_of(model)
    *tables, last = name.split(".")
    table = body
    for each in tables:
        table[each] = dict(table.get(each, {}))
        table = table[each]
    table[last] = value
    return body


def bodies(model: str, entry: ModelEntry) -> Iterator[tuple[str, str, JSON, bool]]:
    """Submissions at the edges of a model's limits: the field, the limit, the body, and whether it
    is accepted.
    """
    for name, rule in entry.fields.items():
        for edge in edges(rule):
            for value in edge.accepted:
                yield name, edge.limit, placed(entry, model, name, value), True
            for value in edge.refused:
                yield name, edge.limit, placed(entry, model, name, value), False
        body = placed(entry, model, name, None)
        yield name, "required", body, not rule.required
        for other, wanted in (rule.only_with or {}).items():
            value = next(value for edge in edges(rule) for value in edge.accepted)
            body = placed(entry, model, name, value)
            yield name, "only_with", body | {other: wanted}, True
            yield name, "only_with", body | {other: next_to(wanted)}, False
        most: int | None = getattr(rule, "with_images", None)
        for images in () if most is None else (most - 3, most - 2, most - 1):
            body = placed(entry, model, name, 2) | {"image_urls": [LINK] * images}
            yield name, "with_images", body, images + 2 <= (most or 0)


def next_to(value: Any) -> Any:
    return value + 1 if type(value) is int else None


def valued(body: JSON, name: str) -> Any:
    return value_at(body, name)


# --- input images


@dataclass(frozen=True)
class Figures:
    """The figures of an input image."""

    media_type: str = "image/png"
    bytes: int = 1000
    width: int = 1000
    height: int = 1000
    alpha: bool = False


KNOWN_FORMATS = ("jpeg", "png", "bmp", "webp", "gif", "tiff", "avif")


def image_edges(rule: ImagesField) -> Iterator[tuple[str, Figures, str]]:
    """Images at the limits: the limit, the figures, and the measured value of a refusal, or "" for
    an image that is accepted.
    """
    low, first = rule.min_side or 1, (rule.formats or ["png"])[0]
    usual = Figures(f"image/{first}", width=max(low, 1000), height=max(low, 1000))
    for name in KNOWN_FORMATS if rule.formats else ():
        wrong = name not in (rule.formats or ())
        yield "formats", replace(usual, media_type=f"image/{name}"), name.upper() * wrong
    if not rule.alpha:
        for alpha in (True, False):
            yield "alpha", replace(usual, media_type="image/png", alpha=alpha), "alpha" * alpha
    for size in around(rule.max_bytes):
        yield "max_bytes", replace(usual, bytes=size), str(size) * (size > (rule.max_bytes or 0))
    for limit, width, height, measured in side_edges(rule, low):
        for sides in ((width, height), (height, width)):
            figures = replace(usual, width=sides[0], height=sides[1])
            total = str(width * height) if limit == "max_pixels" else f"{sides[0]}x{sides[1]}"
            yield limit, figures, total * measured


def around(limit: int | None) -> tuple[int, ...]:
    return () if limit is None else (limit - 1, limit, limit + 1)


def side_edges(rule: ImagesField, low: int) -> Iterator[tuple[str, int, int, bool]]:
    """The limit, both sides, and whether they are beyond it."""
    for side in around(rule.min_side):
        yield "min_side", side, max(low, side), side < low
    for side in around(rule.max_side):
        yield "max_side", side, max(low, 1000), side > (rule.max_side or 0)
    if rule.max_pixels is not None:
        side = isqrt(rule.max_pixels)
        for long in (side - 1, side, side + 1):
            yield "max_pixels", side, long, side * long > rule.max_pixels
    for aspect in around(0) if rule.aspect else ():
        short = max(low, 100)
        yield "aspect", short, short * (rule.aspect or 1) + aspect, aspect > 0
