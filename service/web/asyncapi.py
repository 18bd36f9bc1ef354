"""The AsyncAPI 3.0 document: every type of event with its schema, and the ways in which events
come.
"""

from collections.abc import Iterable, Mapping

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service import VERSION
from service.strict_json import JSON
from service.web.event_schemas import EVENT_TYPES, TEST_TYPE, EndpointTest, Event, EventTask

ABOUT = """What happens to tasks, as structured CloudEvents 1.0. Each comes at least once; `id`
tells repetitions, `sequence` the order.
The JSON Schema of a type of event is `components.schemas` under the type's name. Schemas only grow:
ignore fields that you do not know."""
CLOUD_EVENT = "application/cloudevents+json"
TASK, RESYNC = "task", "resync"
SENT: Mapping[str, type[BaseModel]] = {
    **EVENT_TYPES,
    TEST_TYPE: EndpointTest,
}  # every document that is a CloudEvent
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
            "GET: pages of events after a sequence, held until something is there; a page's"
            " `data` has them."
        ),
        EVENT_TYPES,
    ),
    "taskCallbacks": (
        None,
        (
            "POST of a task that has ended to its own `callback_url`, signed by"
            " Standard Webhooks with its owner's callback secret."
        ),
        (TASK,),
    ),
}
SIGNED = ("webhooks", "taskCallbacks")
HEADERS = {
    "webhook-id": "the event's id, however often it comes",
    "webhook-timestamp": "of this attempt, in seconds since 1970 UTC",
    "webhook-signature": "`v1,…` for each valid secret, space-separated",
}
SEQUENCE = {"type": "string", "pattern": "^[0-9]{20}$"}
RESYNC_SCHEMA = {
    "type": "object",
    "description": (
        "Events after the reader's place are no longer kept; what follows begins with this one."
    ),
    "required": ["sequence"],
    "properties": {"sequence": SEQUENCE},
}


def document() -> JSON:
    """The whole document."""
    kinds = sorted(set(SENT.values()), key=lambda kind: kind.__name__)
    _, shapes = models_json_schema(
        [(kind, "serialization") for kind in kinds], ref_template="#/components/schemas/{model}"
    )
    messages = {type: message(type, CLOUD_EVENT, type) for type in SENT}
    messages |= {
        TASK: message(TASK, "application/json", EventTask.__name__),
        RESYNC: message(RESYNC, "application/json", RESYNC),
    }
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "Darkroom", "version": VERSION, "description": ABOUT},
        "defaultContentType": CLOUD_EVENT,
        "channels": {name: channel(name) for name in CHANNELS},
        "operations": {
            name: {"action": "send", "channel": {"$ref": f"#/channels/{name}"}} for name in CHANNELS
        },
        "components": {
            "schemas": {
                **shapes["$defs"],
                **{type: event_schema(type) for type in SENT},
                RESYNC: RESYNC_SCHEMA,
            },
            "messages": {
                **messages,
                **{f"{name}.signed": signed(messages[name]) for name in (*SENT, TASK)},
            },
        },
    }


def channel(name: str) -> JSON:
    address, about, types = CHANNELS[name]
    form = ".signed" if name in SIGNED else ""
    return {
        "address": address,
        "description": about,
        "messages": {type: {"$ref": f"#/components/messages/{type}{form}"} for type in types},
    }


def message(name: str, content_type: str, schema: str) -> JSON:
    return {
        "name": name,
        "contentType": content_type,
        "payload": {"$ref": f"#/components/schemas/{schema}"},
    }


def signed(message: JSON) -> JSON:
    headers = {
        header: {"type": "string", "description": about} for header, about in HEADERS.items()
    }
    return {
        **message,
        "headers": {"type": "object", "required": list(headers), "properties": headers},
    }


def event_schema(type: str) -> JSON:
    """The JSON Schema of a type of event: that of any, with its own type and data."""
    shape = Event.model_json_schema(mode="serialization")
    special: JSON = {
        "source": {"type": "string", "format": "uri-reference"},
        "type": {"const": type},
        "time": {"type": "string", "format": "date-time"},
        "sequence": SEQUENCE,
        "data": {"$ref": f"#/components/schemas/{SENT[type].__name__}"},
    }
    return {
        "type": "object",
        "required": shape["required"],
        "properties": {**shape["properties"], **special},
    }
