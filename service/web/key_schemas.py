"""The schemas of API keys, which may bring a budget, and of owners' callback secrets."""

from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from service.events.outbox import OPERATORS
from service.web.endpoint_schemas import Rotation
from service.web.field_schemas import Body, Owner, Scope, Shape, list_of
from service.web.money_schemas import NewBudget


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


class Key(Shape):
    id: str
    owner: str
    hint: str
    scopes: list[str]
    created_at: str
    revoked_at: str | None


class KeyBudget(Shape):
    period: str
    credits: float


class CreatedKey(Key):
    key: str = Field(description="shown here only")
    callback_secret: str | None = Field(
        description="with the owner's first key: signs deliveries to its tasks' callback_urls"
    )
    budget: KeyBudget | None = Field(description="the owner's budget, if this request set it")


class SecretRotation(Rotation):
    owner: Owner | None = Field(None, description="admin: an owner; by default the caller's own")


class CallbackSecret(Shape):
    owner: str
    callback_secret: str = Field(description="shown here only")


KeyList = list_of(Key)
