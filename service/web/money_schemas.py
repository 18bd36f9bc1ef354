"""The schemas of money: estimates, budgets, entries of the ledger, and usage."""

from decimal import Decimal
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from service.credits import MAX_CREDITS
from service.web.catalogue_schemas import Credits
from service.web.field_schemas import Body, Period, Shape, list_of
from service.web.task_schemas import Submission


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


class EstimatedSubmission(Submission):
    """A submission, of which only `model` is needed."""


class BudgetFigures(Shape):
    limit: Credits
    spent: Credits
    reserved: Credits
    left: Credits


class Estimate(Shape):
    credits: Credits | None
    unit: Literal["credits"]
    price: Credits | None
    n: int = Field(description="the number of paid images or requests")
    per: Literal["image", "request"] = Field(
        description="the price is for an image or for a request"
    )
    basis: Literal["catalogue", "unknown"]
    budget: BudgetFigures | None


class RefusingBudget(BudgetFigures):
    """A budget that is too small for a submission."""

    owner: str
    period: Period
    estimate: Credits | None = Field(description="of the refused task; null without a price")


class NewBudget(Body):
    period: Period
    credits: CreditLimit


class BudgetChange(Body):
    """A limit of credits for a period. Null clears the budget."""

    period: Period
    credits: CreditLimit | None


class OwnersBudget(Shape):
    owner: str
    period: Period
    since: str = Field(description="the beginning of the current period")
    limit: Credits | None
    credits: Credits | None = Field(description="the same as `limit`")
    spent: Credits
    reserved: Credits
    left: Credits | None


class BookedEntry(Shape):
    """An entry of the ledger. It is never changed and never deleted."""

    id: str
    time: str
    task_id: str
    owner: str
    model: str
    upstream: str
    kind: Literal["estimate", "reserve", "charge", "refund", "adjust"]
    credits: Credits = Field(description="a release and a refund are negative")
    source: Literal["catalogue", "submit", "query", "callback", "operator"]


class UsageTotals(Shape):
    """Sums of tasks. `used` is before `refunded`."""

    tasks: int
    images_requested: int
    images: int = Field(description="that were stored")
    estimated: Credits
    reserved: Credits
    used: Credits
    refunded: Credits


class UsageRow(UsageTotals):
    key: str = Field(description="the day in UTC, the model, the owner or the task")


class UsageReport(Shape):
    data: list[UsageRow]
    totals: UsageTotals


BudgetList = list_of(OwnersBudget)
EntryList = list_of(BookedEntry)
