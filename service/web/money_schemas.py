"""The schemas of money: entries of the ledger, and usage."""

from typing import Literal

from pydantic import Field

from service.web.catalogue_schemas import Credits
from service.web.field_schemas import Body, list_of
from service.web.key_schemas import CreditLimit
from service.web.shapes import Shape


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


class BudgetChange(Body):
    """A limit of credits for a period. Null clears the budget."""

    period: Literal["day", "month", "total"]
    credits: CreditLimit | None


class OwnersBudget(Shape):
    owner: str
    period: Literal["day", "month", "total"]
    since: str = Field(description="the beginning of the current period")
    limit: Credits | None
    credits: Credits | None = Field(description="the same as `limit`")
    spent: Credits
    reserved: Credits
    left: Credits | None


BudgetList = list_of(OwnersBudget)
EntryList = list_of(BookedEntry)
