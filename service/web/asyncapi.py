"""The AsyncAPI 3.0 document: every type of event with its schema, and the ways in which events come."""

from collections.abc import Mapping

from pydantic.json_schema import models_json_schema

from service import VERSION
from service.model import JSON
from service.web.event_schemas import EVENT_TYPES, EventTask

ABOUT = "What happens to tasks, as structured CloudEvents 1.0. Each comes at least once; `id` tells repetitions, `sequence` the order."
CLOUD_EVENT = "application/cloudevents+json"
REF = "#/components/schemas/{model}"
TASK = "task"
CHANNELS: Mapping[str, tuple[str | None, str]] = {
    "webhooks": (None, "POST to an endpoint's `url`, signed by Standard Webhooks."),
    "stream": ("/v1/events", "GET with `Accept: text/event-stream`: from now on, or after `after` or `Last-Event-ID`."),
    "pull": ("/v1/events", "GET: pages of events after a sequence, held until something is there."),
}
TASK_CALLBACKS = "POST of a task that has ended to its own `callback_url`, signed by Standard Webhooks with its owner's callback secret."
HEADERS = {
    "webhook-id": "the event's id, however often it comes",
    "webhook-timestamp": "of this attempt, in seconds since 1970 UTC",
    "webhook-signature": "`v1,…` for each valid secret, space-separated",
}


def document() -> JSON:
    """The whole document."""
    kinds = sorted(set(EVENT_TYPES.values()), key=lambda kind: kind.__name__)
    _, shapes = models_json_schema([(kind, "serialization") for kind in kinds], ref_template=REF)
    everything = {dashed(type): {"$ref": f"#/components/messages/{dashed(type)}"} for type in EVENT_TYPES}
    channels: JSON = {
        name: {"address": address, "description": about, "messages": everything} for name, (address, about) in CHANNELS.items()
    }
    channels["taskCallbacks"] = {
        "address": None,
        "description": TASK_CALLBACKS,
        "messages": {TASK: {"$ref": f"#/components/messages/{TASK}"}},
    }
    messages = {dashed(type): message(type, CLOUD_EVENT, event_schema(type)) for type in EVENT_TYPES}
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "Darkroom", "version": VERSION, "description": ABOUT},
        "defaultContentType": CLOUD_EVENT,
        "channels": channels,
        "operations": {name: {"action": "send", "channel": {"$ref": f"#/channels/{name}"}} for name in channels},
        "components": {
            "schemas": shapes["$defs"],
            "messages": {**messages, TASK: message(TASK, "application/json", {"$ref": REF.format(model=EventTask.__name__)})},
        },
    }


def dashed(type: str) -> str:
    """A type as a key, which has no full stops in AsyncAPI."""
    return type.replace(".", "-")


def message(name: str, content_type: str, payload: JSON) -> JSON:
    headers = {header: {"type": "string", "description": about} for header, about in HEADERS.items()}
    return {"name": name, "contentType": content_type, "headers": {"type": "object", "properties": headers}, "payload": payload}


def event_schema(type: str) -> JSON:
    """The JSON Schema of a type of event."""
    properties: JSON = {
        "specversion": {"const": "1.0"},
        "id": {"type": "string"},
        "source": {"type": "string", "format": "uri-reference"},
        "type": {"const": type},
        "subject": {"type": ["string", "null"], "description": "the task's id"},
        "time": {"type": "string", "format": "date-time"},
        "datacontenttype": {"const": "application/json"},
        "sequence": {"type": "string", "pattern": "^[0-9]{20}$"},
        "data": {"$ref": REF.format(model=EVENT_TYPES[type].__name__)},
    }
    return {"type": "object", "required": list(properties), "properties": properties}
