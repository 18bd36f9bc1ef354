"""The schemas of the catalogue."""

from typing import Any, Literal

from pydantic import Field

from service.web.field_schemas import Shape, list_of

Credits = int | float
FieldType = Literal[
    "string", "integer", "number", "boolean", "object", "size", "images", "unsupported"
]


class CatalogueField(Shape):
    """A field and its limits. A submission with an `unsupported` field is refused."""

    type: FieldType
    required: bool
    default: str | int | bool | None
    min: int | None
    max: int | None
    unit: Literal["characters", "tokens"] | None
    values: list[str | int] | None
    range: str = Field(description="the limits in words")
    limits: dict[str, Any] = Field(description="limits that only this type has")
    source: str | None = Field(description="where the limits are documented")
    note: str | None


class CatalogueSizes(Shape):
    """The sizes of a model, in pixels. `aspect`: the longest side over the shortest."""

    forms: list[Literal["names", "pixels", "ratios"]]
    default: str | None
    values: list[str] | None
    pixels: list[int] | None = Field(description="range of width x height")
    side: list[int] | None = Field(description="range of width and of height")
    aspect: int | None
    multiple: int | None
    source: str | None
    note: str | None


class CatalogueImages(Shape):
    """The number of input images, and the rules for each."""

    min: int
    max: int | None
    formats: list[str] | None
    alpha: bool = Field(description="whether an image may have an alpha channel")
    max_bytes: int | None
    min_side: int | None
    max_side: int | None
    max_pixels: int | None
    aspect: int | None
    source: str | None
    note: str | None


class CataloguePrice(Shape):
    """The price of an image, or of a request that makes about `images` images. Where it depends on
    a field, `by` names the field and `values` has its prices.
    """

    unit: Literal["credits"]
    credits: Credits
    per: Literal["image", "request"]
    images: int | None
    by: str | None
    values: dict[str, Credits] | None
    pixels: dict[str, str] | None = Field(
        description="from how many pixels in all a size in pixels counts as which of `values`"
    )
    source: str | None
    note: str | None


class CatalogueModel(Shape):
    model: str
    upstream: str
    source: str | None
    note: str | None
    edits: bool = Field(description="whether it changes given images")
    fields: dict[str, CatalogueField]
    sizes: CatalogueSizes | None
    input_images: CatalogueImages | None
    price: CataloguePrice | None
    example: dict[str, Any] = Field(description="a submission")


CatalogueList = list_of(CatalogueModel)
