"""A model of the catalogue: its fields, its price, an example, and its document.

The catalogue's file is made of these tables. `catalogue_schema` is its JSON Schema.
"""

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StrictBool, StrictInt, field_serializer, model_validator
from pydantic.config import JsonDict

from service.credits import credits_number, millionths
from service.strict_json import JSON
from service.upstreams.catalogue_fields import (
    AnyField,
    CataloguePart,
    FieldRule,
    ImagesField,
    NumberField,
    SizeField,
)
from service.upstreams.field_values import pixels_of, shown

NO_OTHERS: JsonDict = {"additionalProperties": False}  # than names of the given pattern
EXAMPLE_PROMPT = "a lighthouse in the fog"
EXAMPLE_IMAGE = "https://example.com/photo.png"
# The ledger sums prices times `n` in 64-bit integers of millionths. `n` holds for every model.
MAX_N, MAX_PRICE = 1000, 10**6
ANY_N = NumberField(type="integer", min=1, max=MAX_N)


def whole_millionths(credits: Decimal) -> Decimal:
    if credits != credits.quantize(Decimal("0.000001")):
        raise ValueError("should have at most 6 decimal places")
    return credits


def as_json(table: JSON) -> JSON:
    """The table with the numbers of JSON in place of decimals."""
    document: JSON = json.loads(json.dumps(table, default=float))
    return document


Credits = Annotated[Decimal, Field(ge=0, le=MAX_PRICE), AfterValidator(whole_millionths)]
PixelCount = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,11})$")]
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")]
FieldName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$")]


class PriceRule(CataloguePart):
    """Credits for an image, or for a request that makes about `images` images. Where the price
    depends on a field, `by` names it and `values` has the price of each of its values. `pixels`:
    from how many pixels in all a size in pixels counts as which of these values.
    """

    credits: Credits
    per: Literal["image", "request"] = "image"
    images: Annotated[StrictInt, Field(ge=1)] | None = None
    by: FieldName | None = None
    values: dict[str, Credits] | None = None
    pixels: dict[PixelCount, str] | None = Field(default=None, json_schema_extra=NO_OTHERS)
    source: str | None = None
    note: str | None = None

    @model_validator(mode="after")
    def _check_values(self) -> "PriceRule":
        if (self.by is None) != (self.values is None):
            raise ValueError("by and values belong together")
        unknown = set((self.pixels or {}).values()) - set(self.values or ())
        if unknown:
            raise ValueError(f"pixels: values has no {', '.join(sorted(unknown))}")
        return self

    @field_serializer("credits")
    def _number(self, credits: Decimal) -> int | float | None:
        return credits_number(millionths(credits))

    @field_serializer("values")
    def _numbers(self, values: dict[str, Decimal] | None) -> dict[str, int | float | None] | None:
        if values is None:
            return None
        return {name: credits_number(millionths(credits)) for name, credits in values.items()}


class ModelEntry(CataloguePart):
    """A model. `like`: the model whose fields it begins with. `source`: where its limits are
    documented, if a part does not say otherwise. `edits`: whether it changes given images, by
    default whether it takes some.
    """

    like: str | None = None
    source: str | None = None
    note: str | None = None
    edits: StrictBool | None = None
    fields: dict[FieldName, AnyField] = Field(default_factory=dict, json_schema_extra=NO_OTHERS)
    price: PriceRule | None = None
    example: Annotated[dict[str, Any], AfterValidator(as_json)] | None = None

    def sourced(self, otherwise: str) -> "ModelEntry":
        """The entry with a source in each part."""
        source = {"source": self.source or otherwise}
        changes: JSON = {
            "fields": {
                name: rule if rule.source else rule.model_copy(update=source)
                for name, rule in self.fields.items()
            }
        }
        if self.price is not None and not self.price.source:
            changes["price"] = self.price.model_copy(update=source)
        return self.model_copy(update=changes)

    def over(self, below: "ModelEntry", otherwise: str) -> "ModelEntry":
        """The entry on top of another: a part that it does not give is the other's."""
        changes = {name: getattr(self, name) for name in self.model_fields_set}
        changes["fields"] = below.fields | self.fields
        changes["source"] = self.source or below.source or otherwise
        return below.model_copy(update=changes)

    def fields_alone(self) -> "ModelEntry":
        return ModelEntry(edits=self.edits, fields=self.fields)

    def complaint(self, body: Mapping[str, Any], *, whole: bool = True) -> tuple[str, str] | None:
        """The first field of a submission that breaks a limit, and the message. A null field counts
        as absent. Without `whole`, fields may be missing.
        """
        for name, rule in [*self.fields.items(), ("n", ANY_N)]:
            value = value_at(body, name)
            if value is None and not whole:
                continue
            if message := rule.complaint(name, value) or self._alone(name, rule, body):
                return name, message
        return None

    def _alone(self, name: str, rule: FieldRule, body: Mapping[str, Any]) -> str | None:
        """Why a field is refused beside the others."""
        if value_at(body, name) is None:
            return None
        for other, required in (rule.only_with or {}).items():
            if (actual := self._chosen(body, other)) != required:
                allowed = f"{name} is accepted only with {other} = {shown(required)}"
                return f"{allowed}, and {other} is {shown(actual)}"
        return self._together(name, rule, body)

    def _together(self, name: str, rule: FieldRule, body: Mapping[str, Any]) -> str | None:
        """Why a number is refused beside the input images."""
        links = value_at(body, "image_urls")
        most = getattr(rule, "with_images", None) if isinstance(links, list) else None
        if most is None:
            return None
        number, images = value_at(body, name), len(links)
        if number + images <= most:
            return None
        limit = f"{name} and the number of image_urls are together at most {most}"
        return f"{limit}, not {number} and {images}"

    def unknown_field(self) -> tuple[list[str], str] | None:
        """The place of a field's name in the entry that names none of its fields, and that name."""
        by = self.price.by if self.price is not None else None
        references = [] if by is None else [(["price", "by"], by)]
        for name, rule in self.fields.items():
            others = rule.only_with or ()
            references += [(["fields", name, "only_with", other], other) for other in others]
        return next((each for each in references if each[1] not in self.fields), None)

    def price_of(self, body: Mapping[str, Any]) -> int | None:
        """The price of an image, or of the request, in millionths."""
        if self.price is None:
            return None
        chosen = None if self.price.by is None else self._chosen(body, self.price.by)
        if self.price.pixels and (sides := pixels_of(value_at(body, "size"))) is not None:
            reached = [n for n in map(int, self.price.pixels) if n <= sides[0] * sides[1]]
            chosen = self.price.pixels[str(max(reached))] if reached else chosen
        return millionths((self.price.values or {}).get(str(chosen), self.price.credits))

    def images_of(self, body: Mapping[str, Any]) -> int:
        """The number of images that a submission asks for."""
        if self.price is not None and self.price.images is not None:
            return self.price.images
        n = self._chosen(body, "n")
        return n if type(n) is int and n > 0 else 1

    def _chosen(self, body: Mapping[str, Any], name: str) -> Any:
        """The value of a field, or its default."""
        value = value_at(body, name)
        return getattr(self.fields.get(name), "default", None) if value is None else value

    def example_of(self, name: str) -> JSON:
        """A submission that the limits allow."""
        prompt, images = self.fields.get("prompt"), self.fields.get("image_urls")
        example: JSON = {"model": name}
        if prompt is not None and prompt.required:
            example["prompt"] = EXAMPLE_PROMPT
        if isinstance(images, ImagesField) and images.min:
            example["image_urls"] = [EXAMPLE_IMAGE] * images.min
        return example | (self.example or {})

    def document(self, name: str, upstream: str) -> JSON:
        """The entry as clients see it."""
        size, images = self.fields.get("size"), self.fields.get("image_urls")
        images = images if isinstance(images, ImagesField) else None
        return {
            "model": name,
            "upstream": upstream,
            "source": self.source,
            "note": self.note,
            "edits": images is not None if self.edits is None else self.edits,
            "fields": {name: rule.document() for name, rule in self.fields.items()},
            "sizes": size.rules() if isinstance(size, SizeField) else None,
            "input_images": images and images.rules(),
            "price": self.price and {"unit": "credits"} | self.price.model_dump(mode="json"),
            "example": self.example_of(name),
        }


class CatalogueFile(CataloguePart):
    """The file: models by their names."""

    models: dict[ModelName, ModelEntry] = Field(default_factory=dict, json_schema_extra=NO_OTHERS)


def value_at(body: Mapping[str, Any], name: str) -> Any:
    """The value at a dotted name, None if there is none."""
    value: Any = body
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def catalogue_schema() -> JSON:
    """The JSON Schema of the file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | (
        CatalogueFile.model_json_schema(mode="validation")
    )
