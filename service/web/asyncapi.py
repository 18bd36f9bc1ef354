"""The AsyncAPI 3.0 document: the schema of each event type, and the channels of events."""

from collections.abc import Iterable, Mapping

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service import VERSION
from service.strict_json import JSON
from service.web.event_schemas import EVENT_TYPES, TEST_TYPE, EndpointTest, Event, EventTask

ABOUT = """Events about tasks, as structured CloudEvents 1.0. Each event comes at least once. A
repeated event has the same `id`. `sequence` is the order.
`components.schemas` has the JSON Schema of each event type under the type's name. Schemas only
grow: ignore unknown fields."""
CLOUD_EVENT = "application/cloudevents+json"
TASK, RESYNC = "task", "resync"
SENT: Mapping[str, type[BaseModel]] = {**EVENT_TYPES, TEST_TYPE: EndpointTest}
CHANNELS: Mapping[str, tuple[str | None, str, Iterable[str]]] = {
    "webhooks": (None, "POST to an endpoint's `url`, signed by Standard Webhooks.", SENT),
    "stream": (
        "/v1/events",
        (
            "GET with `Accept: text/event-stream`: from now on, or after `after` or"
            " `Last-Event-ID`. `id` is the sequence, `event` the type."
        ),
        (*EVENT_TYPES, RESYNC),
    ),
    "pull": (
        "/v1/events",
        (
            "GET: pages of events after a sequence. `wait` holds the response until an event is"
            " available. `data` contains the events."
        ),
        EVENT_TYPES,
    ),
    "taskCallbacks": (
        None,
        (
            "POST of a terminal task to its own `callback_url`, signed by Standard Webhooks with"
            " its owner's callback secret."
        ),
        (TASK,),
    ),
}
SIGNED = ("webhooks", "taskCallbacks")
HEADERS = {
    "webhook-id": "the event's id, the same in each delivery",
    "webhook-timestamp": "of this attempt, in seconds since 1970 UTC",
    "webhook-signature": "`v1,…` for each valid secret and `v1a,…` (Ed25519), space-separated",
}
SEQUENCE = {"type": "string", "pattern": "^[0-9]{20}$"}
RESYNC_SCHEMA = {
    "type": "object",
    "description": (
        "The service no longer keeps the events after the reader's position. The stream continues"
        " with this sequence."
    ),
    "required": ["sequence"],
    "properties": {"sequence": SEQUENCE},
}


def document() -> JSON:
    kinds = sorted(set(SENT.values()), key=lambda kind: kind.__name__)
    _, models = models_json_schema(
        [(kind, "serialization") for kind in kinds], ref_template="#/components/schemas/{model}"
    )
    schemas = {**models["$defs"], **{type: event_schema(type) for type in SENT}}
    messages = {type: message(type, CLOUD_EVENT, type) for type in SENT}
    messages[TASK] = message(TASK, "application/json", EventTask.__name__)
    messages[RESYNC] = message(RESYNC, "application/json", RESYNC)
    signed_messages = {f"{name}.signed": signed(messages[name]) for name in (*SENT, TASK)}
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "Darkroom", "version": VERSION, "description": ABOUT},
        "defaultContentType": CLOUD_EVENT,
        "channels": {name: channel(name) for name in CHANNELS},
        "operations": {
            name: {"action": "send", "channel": {"$ref": f"#/channels/{name}"}} for name in CHANNELS
        },
        "components": {
            "schemas": {**schemas, RESYNC: RESYNC_SCHEMA},
            "messages": {**messages, **signed_messages},
        },
    }


def channel(name: str) -> JSON:
    address, about, types = CHANNELS[name]
    form = ".signed" if name in SIGNED else ""
    messages = {type: {"$ref": f"#/components/messages/{type}{form}"} for type in types}
    return {"address": address, "description": about, "messages": messages}


def message(name: str, content_type: str, schema: str) -> JSON:
    payload = {"$ref": f"#/components/schemas/{schema}"}
    return {"name": name, "contentType": content_type, "payload": payload}


def signed(message: JSON) -> JSON:
    headers = {name: {"type": "string", "description": about} for name, about in HEADERS.items()}
    schema = {"type": "object", "required": list(headers), "properties": headers}
    return {**message, "headers": schema}


def event_schema(type: str) -> JSON:
    """The JSON Schema of an event type: the general schema with its own type and data."""
    schema = Event.model_json_schema(mode="serialization")
    special: JSON = {
        "source": {"type": "string", "format": "uri-reference"},
        "type": {"const": type},
        "time": {"type": "string", "format": "date-time"},
        "sequence": SEQUENCE,
        "data": {"$ref": f"#/components/schemas/{SENT[type].__name__}"},
    }
    properties = {**schema["properties"], **special}
    return {"type": "object", "required": schema["required"], "properties": properties}
