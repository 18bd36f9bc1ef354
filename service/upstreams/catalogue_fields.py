"""The fields of a model in the catalogue: the values that each accepts, and the refusals.

`type` in the file chooses the class. Lengths are characters, sizes are pixels.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, model_validator

from service.strict_json import JSON
from service.upstreams.field_values import RATIO, is_texts, pixels_of, shown, span

NO_RULES = {"type", "required", "only_with"}  # of sizes and of input images
COMMON = ("type", "required", "default", "min", "max", "unit", "values", "source", "note")

Count = Annotated[StrictInt, Field(ge=0)]
Range = tuple[Count, Count]
ImageFormat = Literal["jpeg", "png", "bmp", "webp", "gif", "tiff", "avif"]


class CataloguePart(BaseModel):
    """A table of the catalogue's file."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class FieldRule(CataloguePart):
    """The keys of every field. `only_with`: the values that other fields must have beside it.
    `source`: where the upstream documents the field's limits.
    """

    required: StrictBool = False
    only_with: dict[str, StrictBool | StrictInt | str] | None = None
    source: str | None = None
    note: str | None = None

    def words(self) -> str:
        """The accepted values, in words that follow "be"."""
        raise NotImplementedError

    def accepts(self, value: Any) -> bool:
        raise NotImplementedError

    def measured(self, value: Any) -> str:
        """The part of a refused value that breaks the limit."""
        return shown(value)

    def complaint(self, name: str, value: Any) -> str | None:
        """Why a value is refused. It names the field, its limit and the value."""
        if value is None:
            return f"{name} is required: it must be {self.words()}" if self.required else None
        if self.accepts(value):
            return None
        return f"{name} must be {self.words()}, not {self.measured(value)}"

    def document(self) -> JSON:
        """The field as clients see it. `limits` has what only its type has."""
        rules = self.model_dump(mode="json")
        limits = {name: value for name, value in rules.items() if name not in COMMON}
        given = {name: value for name, value in limits.items() if value is not None}
        others = [f"{name} = {shown(value)}" for name, value in (self.only_with or {}).items()]
        words = ", only with ".join([self.words(), *([" and ".join(others)] if others else [])])
        if (most := getattr(self, "with_images", None)) is not None:
            words += f", together with the input images at most {most}"
        return {name: rules.get(name) for name in COMMON} | {"range": words, "limits": given}

    @model_validator(mode="after")
    def _check_ranges(self) -> "FieldRule":
        ranges = {
            f"{name} and {other}": (getattr(self, name, None), getattr(self, other, None))
            for name, other in (("min", "max"), ("min_side", "max_side"))
        }
        ranges |= {name: getattr(self, name, None) or (None, None) for name in ("pixels", "side")}
        for name, (low, high) in ranges.items():
            if low is not None and high is not None and low > high:
                raise ValueError(f"{name}: {low} is more than {high}")
        return self

    @model_validator(mode="after")
    def _check_default(self) -> "FieldRule":
        default = getattr(self, "default", None)
        if default is not None and (message := self.complaint("default", default)):
            raise ValueError(message)
        return self


class TextField(FieldRule):
    """Text, of some length or one of `values`. `unit` tokens: only the upstream can count them, but
    each word is at least one. The service counts words.
    """

    type: Literal["string"]
    default: str | None = None
    min: Count = 0
    max: Count | None = None
    unit: Literal["characters", "tokens"] = "characters"
    values: Annotated[list[str], Field(min_length=1)] | None = None

    def words(self) -> str:
        if self.values is not None:
            return f"one of {', '.join(self.values)}"
        length = span(self.min or None, self.max)
        return f"text of {length} {self.unit}" if length else "text"

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, str) or (self.values is not None and value not in self.values):
            return False
        return len(value) >= self.min and (self.max is None or self._length(value) <= self.max)

    def measured(self, value: Any) -> str:
        if self.values is not None or not isinstance(value, str):
            return shown(value)
        least = "at least " if self.unit == "tokens" and value else ""
        return f"{least}{self._length(value)}"

    def _length(self, value: str) -> int:
        return len(value.split()) if self.unit == "tokens" else len(value)


class NumberField(FieldRule):
    """A number in a range, or one of `values`. `with_images`: the most that it and the number of
    input images are together.
    """

    type: Literal["integer", "number"]
    default: StrictInt | None = None
    min: StrictInt | None = None
    max: StrictInt | None = None
    values: Annotated[list[StrictInt], Field(min_length=1)] | None = None
    with_images: Count | None = None

    def words(self) -> str:
        if self.values is not None:
            return f"one of {', '.join(map(str, self.values))}"
        kind = "a whole number" if self.type == "integer" else "a number"
        limits = span(self.min, self.max)
        return f"{kind} from {limits}" if " to " in limits else f"{kind} of {limits}".rstrip(" of")

    def accepts(self, value: Any) -> bool:
        if type(value) is not int and (self.type == "integer" or type(value) is not float):
            return False
        if self.values is not None:
            return value in self.values
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max)


class FlagField(FieldRule):
    type: Literal["boolean"]
    default: StrictBool | None = None

    def words(self) -> str:
        return "true or false"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, bool)


class ObjectField(FieldRule):
    """An object. Its own fields are further fields with dotted names."""

    type: Literal["object"]

    def words(self) -> str:
        return "an object"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, dict)


class SizeField(FieldRule):
    """One of `values`, such as a ratio, or WIDTHxHEIGHT within the other limits.

    `pixels`: range of width x height. `side`: range of width and of height. `aspect`: how many
    times as long as the short side the long side may be. `multiple`: a divisor of both sides.
    Without `pixels` and `side` only `values` are accepted.
    """

    type: Literal["size"]
    default: str | None = None
    values: list[str] | None = None
    pixels: Range | None = None
    side: Range | None = None
    aspect: Annotated[StrictInt, Field(ge=1)] | None = None
    multiple: Annotated[StrictInt, Field(ge=1)] | None = None

    def words(self) -> str:
        forms = list(self.values or [])
        if self.pixels or self.side:
            limits = [f"{self.pixels[0]} to {self.pixels[1]} pixels in all"] if self.pixels else []
            limits += [f"sides of {self.side[0]} to {self.side[1]}"] if self.side else []
            limits += [f"multiples of {self.multiple}"] if self.multiple else []
            limits += [f"an aspect from 1:{self.aspect} to {self.aspect}:1"] if self.aspect else []
            example = f", such as {self.default}," if pixels_of(self.default) else ""
            forms.append(f"WIDTHxHEIGHT in pixels{example} with {', '.join(limits)}")
        return (f"one of {', '.join(forms[:-1])} or " if forms[1:] else "") + "".join(forms[-1:])

    def accepts(self, value: Any) -> bool:
        if isinstance(value, str) and value in (self.values or ()):
            return True
        sides = pixels_of(value)
        if sides is None or not (self.pixels or self.side):
            return False
        short, long = min(sides), max(sides)
        return (
            (self.pixels is None or self.pixels[0] <= short * long <= self.pixels[1])
            and (self.side is None or (self.side[0] <= short and long <= self.side[1]))
            and (self.aspect is None or long <= self.aspect * short)
            and (self.multiple is None or not (short % self.multiple or long % self.multiple))
        )

    def rules(self) -> JSON:
        """The sizes of a model. `forms`: pixels, ratios, or names such as auto."""
        forms = {"pixels"} if self.pixels or self.side else set()
        for value in self.values or ():
            ratio = "ratios" if RATIO.fullmatch(value) else "names"
            forms.add("pixels" if pixels_of(value) else ratio)
        return {"forms": sorted(forms)} | self.model_dump(mode="json", exclude=NO_RULES)

    def measured(self, value: Any) -> str:
        if (sides := pixels_of(value)) is None:
            return shown(value)
        width, height = sides
        aspect = f"{width / height:.4g}:1"
        return f"{shown(value)}, which has {width * height} pixels and an aspect of {aspect}"


class ImagesField(FieldRule):
    """Links of input images: their number, and the rules for each image.

    `alpha` False: no transparency. `aspect` as for a size. `max_pixels`: width x height.
    """

    type: Literal["images"]
    min: Count = 0
    max: Count | None = None
    formats: Annotated[list[ImageFormat], Field(min_length=1)] | None = None
    alpha: StrictBool = True
    max_bytes: Count | None = None
    min_side: Count | None = None
    max_side: Count | None = None
    max_pixels: Count | None = None
    aspect: Annotated[StrictInt, Field(ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _require(cls, table: Any) -> Any:
        """A model that needs at least one input image needs the field."""
        return {"required": bool(table.get("min")), **table} if isinstance(table, dict) else table

    def words(self) -> str:
        return f"a list of {span(self.min or None, self.max)} links".replace("  ", " ")

    def accepts(self, value: Any) -> bool:
        return (
            is_texts(value)
            and self.min <= len(value)
            and (self.max is None or len(value) <= self.max)
        )

    def measured(self, value: Any) -> str:
        return f"{len(value)}" if is_texts(value) else shown(value)

    def rules(self) -> JSON:
        """The number of input images, and the rules for each."""
        return self.model_dump(mode="json", exclude=NO_RULES)


class UnsupportedField(FieldRule):
    """A field that the model does not have. A submission with it is refused."""

    type: Literal["unsupported"]

    def words(self) -> str:
        return "absent"

    def complaint(self, name: str, value: Any) -> str | None:
        return None if value is None else f"{name} is not supported by this model"


AnyField = Annotated[
    TextField | NumberField | FlagField | ObjectField | SizeField | ImagesField | UnsupportedField,
    Field(discriminator="type"),
]
