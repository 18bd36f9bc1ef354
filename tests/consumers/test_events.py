"""The libraries of CloudEvents, JSON Schema and AsyncAPI check every type of event in every way of
delivery.
"""

import json
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]  # it has no types
import pytest
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

from service.web.event_schemas import EVENT_TYPES
from tests.consumers.programs import judged
from tests.consumers.told import JSON, Told, told

WARNING = 1  # and 0 is an error


@pytest.fixture(scope="module")
async def all_told(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Told]:
    async with told(tmp_path_factory.mktemp("told")) as made:
        yield made


def documents(all_told: Told) -> list[bytes]:
    return [
        *all_told.webhooks.values(),
        *all_told.streamed.values(),
        *all_told.pulled.values(),
        all_told.test,
    ]


async def test_the_ways_bring_the_same_events(all_told: Told) -> None:
    """Webhook, stream and pull bring all types, with the same document under each id. The stream
    keeps the sequence.
    """
    ways = [
        {id: json.loads(body) for id, body in way.items()}
        for way in (all_told.webhooks, all_told.streamed, all_told.pulled)
    ]
    assert ways[0] == ways[1] == ways[2]
    assert {event["type"] for event in ways[0].values()} == EVENT_TYPES.keys()
    sequences = [event["sequence"] for event in ways[1].values()]
    assert sequences == sorted(set(sequences))


async def test_every_event_is_a_cloudevent(all_told: Told) -> None:
    """The library parses each event's bytes in structured mode and finds the attributes that
    docs/api.md lists.
    """
    for body in documents(all_told):
        document = json.loads(body)
        event = JSONFormat().read(CloudEvent, body)
        assert [event.get_id(), event.get_source(), event.get_type()] == [
            document[name] for name in ("id", "source", "type")
        ]
        assert event.get_subject() == document["subject"]
        assert event.get_time() == datetime.fromisoformat(document["time"])
        assert (event.get_datacontenttype(), event.get_extension("sequence")) == (
            "application/json",
            document["sequence"],
        )
        assert event.get_data() == document["data"]


def validator(all_told: Told, schema: str) -> jsonschema.Draft202012Validator:
    """A validator for the schema of that name, with formats."""
    rules = {
        "$ref": f"#/components/schemas/{schema}",
        "components": all_told.document["components"],
    }
    return jsonschema.Draft202012Validator(rules, format_checker=jsonschema.FormatChecker())


async def test_every_event_is_as_its_schema_says(all_told: Told) -> None:
    """Each event satisfies the schema under its type's name in /asyncapi.json, and the schema
    describes all of the event's fields.
    """
    for body in documents(all_told):
        event = json.loads(body)
        validator(all_told, event["type"]).validate(event)
        assert described(all_told.document, event["type"]) == event.keys()
    task = json.loads(all_told.task)
    validator(all_told, "EventTask").validate(task)
    assert described(all_told.document, "EventTask") == task.keys()


def described(document: JSON, schema: str) -> set[str]:
    """The fields of a schema. All of them are required."""
    shape = document["components"]["schemas"][schema]
    assert sorted(shape["required"]) == sorted(shape["properties"])
    return set(shape["properties"])


async def test_a_field_that_is_missing_or_wrong_breaks_the_schema(all_told: Told) -> None:
    """Every field is required. An additional field is allowed."""
    event = json.loads(next(iter(all_told.pulled.values())))
    rules = validator(all_told, event["type"])
    rules.validate({**event, "added": 1, "data": {**event["data"], "added": 1}})
    wrong = [{key: value for key, value in event.items() if key != missing} for missing in event]
    wrong += [
        {**event, "data": {key: value for key, value in event["data"].items() if key != missing}}
        for missing in event["data"]
    ]
    wrong += [
        {**event, "type": "image.task.other"},
        {**event, "sequence": "7"},
        {**event, "data": {**event["data"], "state": "new"}},
    ]
    assert [case for case in wrong if rules.is_valid(case)] == []


async def test_asyncapis_own_parser_finds_no_fault(all_told: Told, tmp_path: Path) -> None:
    """The document is AsyncAPI 3.0. It has a message for each event type, for the task's own
    callback, for a test event and for the stream's other messages.
    """
    verdict = json.loads(judged("asyncapi.mjs", json.dumps(all_told.document), tmp_path))
    assert [problem for problem in verdict["diagnostics"] if problem["severity"] <= WARNING] == []
    assert set(verdict["messages"]) == {*EVENT_TYPES, "endpoint.test", "resync", "task"}
    assert all_told.document["asyncapi"] == "3.0.0"


async def test_asyncapis_own_parser_finds_a_fault(all_told: Told, tmp_path: Path) -> None:
    """The parser reports a channel that the document names but does not define."""
    broken = {
        **all_told.document,
        "operations": {"none": {"action": "send", "channel": {"$ref": "#/channels/none"}}},
    }
    verdict = json.loads(judged("asyncapi.mjs", json.dumps(broken), tmp_path))
    assert [problem for problem in verdict["diagnostics"] if problem["severity"] <= WARNING]
