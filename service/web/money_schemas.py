"""The schemas of money: entries of the ledger, and usage."""

from typing import Literal

from pydantic import BaseModel, Field

from service.web.catalogue_schemas import Credits
from service.web.schemas import list_of


class Entry(BaseModel):
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


class UsageTotals(BaseModel):
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


class UsageReport(BaseModel):
    data: list[UsageRow]
    totals: UsageTotals


EntryList = list_of(Entry)
