"""The schemas of new API keys, which may bring a budget."""

from decimal import Decimal
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from service.credits import MAX_CREDITS
from service.web.schemas import Body, Owner, Scope

CreditLimit = Annotated[Decimal, Field(ge=0, le=MAX_CREDITS, max_digits=19, decimal_places=6)]


class NewBudget(Body):
    period: Literal["day", "month", "total"]
    credits: CreditLimit


class NewKey(Body):
    owner: Owner
    scopes: list[Scope] = Field(min_length=1)
    budget: NewBudget | None = Field(default=None, description="set for the owner, if it is given")

    @field_validator("scopes")
    @classmethod
    def _operators(cls, value: list[Scope], info: ValidationInfo) -> list[Scope]:
        if info.data.get("owner") == "admin" and "admin" not in value:
            raise ValueError(
                "the owner admin, who has the operators' events, is for keys with the scope admin"
            )
        return value
