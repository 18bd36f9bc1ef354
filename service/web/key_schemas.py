"""The schemas of new API keys, which may bring a budget."""

from decimal import Decimal
from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from service.credits import MAX_CREDITS
from service.events.outbox import OPERATORS
from service.web.field_schemas import Body, Owner, Scope


def to_millionths(value: object) -> Decimal:
    """A number of credits, rounded to millionths."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise ValueError("must be a number")  # noqa: TRY004 - as pydantic wants it
    if not 0 <= value <= MAX_CREDITS:
        raise ValueError(f"must be a number from 0 to {MAX_CREDITS}")
    return Decimal(str(value)).quantize(Decimal("0.000001"))


NUMBER = {"type": "number", "minimum": 0, "maximum": MAX_CREDITS}
CreditLimit = Annotated[
    Decimal,
    BeforeValidator(to_millionths),
    WithJsonSchema({**NUMBER, "description": "rounded to millionths"}),
]


class NewBudget(Body):
    period: Literal["day", "month", "total"]
    credits: CreditLimit


class NewKey(Body):
    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"properties": {"owner": {"not": {"const": OPERATORS}}}},
                {"properties": {"scopes": {"contains": {"const": "admin"}}}},
            ]
        }
    )

    owner: Owner
    scopes: list[Scope] = Field(min_length=1)
    budget: NewBudget | None = Field(default=None, description="set for the owner, if it is given")

    @field_validator("scopes")
    @classmethod
    def _operators(cls, value: list[Scope], info: ValidationInfo) -> list[Scope]:
        if info.data.get("owner") == OPERATORS and "admin" not in value:
            raise ValueError(
                "the owner admin, who has the operators' events, is for keys with the scope admin"
            )
        return value
