"""The OpenAPI document: valid, complete, and true of the real answers."""

import re
from base64 import b64encode
from functools import cache
from typing import Any

import httpx
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate
from starlette.responses import Response

from service import VERSION
from service.web import (
    delivery_schemas,
    endpoint_schemas,
    money_schemas,
    operator_schemas,
    task_schemas,
)
from service.web.file_schemas import EncodedUpload, FormBody, LinkedUpload
from service.web.key_schemas import NewKey, SecretRotation
from service.web.openapi import document
from service.web.routes.operation import Spec
from service.web.routes.table import SPECS
from tests.api import SUBMIT, UNTIL_DONE, got, order, submitted
from tests.inputs import photo, uploaded
from tests.waiting import wait_until
from tests.world import World, subscriber

JSON = dict[str, Any]
OPTIONAL = {"ErrorDetail": {"budget"}, "Readiness": {"causes"}}  # shown in some cases only


def closed(schema: Any) -> Any:
    """Forbids additional fields on every object of the schema, unless the object allows them."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: closed(item) for name, item in schema.items()}
    if "properties" in made and isinstance(made.get("type"), str):
        made.setdefault("additionalProperties", False)
    return made


@cache
def described() -> JSON:
    return document(SPECS)


@cache
def validator_of(model: str) -> OAS31Validator:
    return OAS31Validator(
        {"$ref": f"#/components/schemas/{model}", "components": closed(described()["components"])}
    )


def check(answer: JSON, model: str) -> None:
    """Raises AssertionError unless the answer has exactly the fields that the document
    describes.
    """
    validator = validator_of(model)
    problems = [
        f"{list(problem.absolute_path)}: {problem.message}"
        for problem in validator.iter_errors(answer)
    ]
    assert not problems, problems


async def test_the_document_is_valid_and_served_to_everybody(here: World) -> None:
    """The document is valid OpenAPI 3.1, and equals the output of the command."""
    served = got(await here.stranger.get("/openapi.json"))
    validate(served)
    assert served == document(SPECS)
    assert served["openapi"].startswith("3.1")
    assert served["info"]["version"] == VERSION


def operation(spec: Spec) -> JSON:
    found: JSON = described()["paths"][spec.path][spec.method.lower()]
    return found


def test_every_route_is_in_the_document_with_its_parameters_and_scopes() -> None:
    """The document describes every route and no other."""
    paths = described()["paths"]
    assert {(method.upper(), path) for path, methods in paths.items() for method in methods} == {
        (spec.method, spec.path) for spec in SPECS
    }
    assert len({operation(spec)["operationId"] for spec in SPECS}) == len(SPECS)
    for spec in SPECS:
        made = operation(spec)
        named = {(parameter["name"], parameter["in"]) for parameter in made["parameters"]}
        headers = (
            {("Idempotency-Key", "header"), ("Prefer", "header")} if spec.path == SUBMIT else set()
        )
        headers |= {("Last-Event-ID", "header")} if spec.path == "/v1/events" else set()
        assert (
            named
            == {(name, "path") for name in re.findall(r"\{(\w+)\}", spec.path)}
            | {(name, "query") for name in spec.query}
            | headers
        )
        assert ("security" in made) == bool(spec.scopes)
        assert all(scope in made.get("description", "") for scope in spec.scopes)
        expected = {str(spec.status), "400", "415", "503"}
        expected |= {"401", "403", "429"} if spec.scopes else set()
        expected |= {"404"} if "{" in spec.path else set()
        expected |= {"408", "413"} if spec.body else set()
        assert expected <= made["responses"].keys()
        assert "default" not in made["responses"]
        assert ("requestBody" in made) == (spec.body is not None)


def test_every_key_of_an_answer_is_always_there() -> None:
    """All fields of an answer are required in the document. An unknown value is null, not
    absent.
    """
    components = described()["components"]["schemas"]
    bodies = {spec.body.__name__ for spec in SPECS if spec.body}
    for name, schema in components.items():
        if name not in bodies | {
            "AnyJson",
            "DeliveryChoice",
            "TaskChoice",
        }:  # the last are in bodies
            always = set(schema["properties"]) - OPTIONAL.get(name, set())
            assert always == set(schema["required"]), name


async def test_a_submissions_fields_are_described_as_they_are_checked(here: World) -> None:
    """A submission that the document allows is accepted, with an unknown field as well."""
    body = order(n=1, prompt_extend=False, metadata={"a": "b"}, anything={"else": 1})
    check(body, "Submission")
    check(got(await here.client.post(SUBMIT, json=body, headers=UNTIL_DONE)), "Task")


async def test_real_answers_are_what_the_document_says(here: World) -> None:
    """The test calls every operation that has a described answer, with existing objects."""
    async with here.owner() as client, subscriber() as takes:
        takes.answer = lambda *_: Response(photo(), media_type="image/png")
        endpoint = got(await client.post("/v1/endpoints", json={"url": takes.url}), 201)
        check(endpoint, "EndpointWithSecret")
        task = await submitted(client, UNTIL_DONE, metadata={"a": "b"})
        await submitted(client, UNTIL_DONE, sandbox={"fail": "service_error"})
        late = await submitted(client, {}, sandbox={"delay": 600})
        doubtful = await submitted(
            here.client, {}, sandbox={"lose_answer": True, "drop_callback": True}
        )

        async def deliveries() -> list[JSON] | None:
            found: list[JSON] = got(
                await client.get("/v1/deliveries", params={"state": "delivered"})
            )["data"]
            return found if len(found) == 5 else None

        delivery = (await wait_until(deliveries))[0]
        key = got(await here.client.post("/v1/keys", json={"owner": "x", "scopes": ["read"]}), 201)
        replay = got(await client.post(f"/v1/endpoints/{endpoint['id']}/replay"))
        ids = {
            "task_id": task["id"],
            "endpoint_id": endpoint["id"],
            "delivery_id": delivery["id"],
            "key_id": key["id"],
            "model": task["model"],
            "owner": task["owner"],
            "file_id": (await uploaded(client))["id"],
        }
        ids["replay_id"] = replay["id"]
        bodies: dict[type[Any], JSON] = {
            task_schemas.Submission: order(),
            money_schemas.EstimatedSubmission: order(),
            endpoint_schemas.NewEndpoint: {"url": takes.url},
            endpoint_schemas.EndpointPatch: {"description": "d"},
            NewKey: {"owner": "y", "scopes": ["read"]},
            task_schemas.Resolution: {"as": "failed"},
            endpoint_schemas.Rotation: {"overlap_s": 0},
            operator_schemas.BulkResolution: {"as": "failed", "dry_run": True},
            operator_schemas.SubmissionChange: {"paused": False},
            SecretRotation: {"overlap_s": 60},
            delivery_schemas.NewReplay: {"only": "all", "dry_run": True},
            money_schemas.BudgetChange: {"period": "total", "credits": 1_000_000},
            EncodedUpload: {"base64_data": b64encode(photo()).decode()},
            LinkedUpload: {"file_url": f"{takes.url}/photo.png"},
        }
        for spec in SPECS:
            if spec.answer is None:
                continue
            own = {"cancel": late, "resolve": doubtful}.get(spec.path.rpartition("/")[2], task)
            path = spec.path.format(**ids | {"task_id": own["id"]})
            for asking in (client, here.client) if "admin" not in spec.scopes else (here.client,):
                once = spec.path.endswith("/cancel") or spec.method == "DELETE"
                if once and asking is here.client:
                    continue
                body: JSON = {"json": bodies.get(spec.body) if spec.body else None}
                if spec.body and issubclass(spec.body, FormBody):
                    body = {"files": {"file": photo()}}
                answer = await asking.request(spec.method, path, **body)
                check(got(answer, spec.status), spec.answer.__name__)


async def test_events_of_tasks_carry_the_documents_task(here: World) -> None:
    """`data` of `image.task.*` is a task without its prompt."""
    await submitted(here.client, UNTIL_DONE)
    for event in await here.events(type="image.task.*"):
        check(event, "Event")
        check(event["data"], "EventTask")


async def test_errors_are_what_the_document_says(here: World) -> None:
    """Refusals of every kind have the same form."""
    asked: tuple[tuple[httpx.AsyncClient, str, str, Any], ...] = (
        (here.client, "GET", "/v1/tasks/unknown", None),
        (here.stranger, "GET", "/v1/tasks", None),
        (here.client, "PUT", "/v1/tasks", None),
        (here.client, "POST", SUBMIT, {}),
        (here.client, "POST", SUBMIT, order(sandbox={"submit_status": 422})),
    )
    for client, method, path, body in asked:
        answer = await client.request(method, path, json=body)
        assert answer.is_client_error
        check(answer.json(), "Error")
