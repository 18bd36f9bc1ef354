"""The OpenAPI 3.1 document, made from the table of routes and the pydantic models."""

import re
from collections.abc import Sequence

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service import VERSION
from service.strict_json import JSON
from service.web.error_responses import Error
from service.web.event_schemas import Event, EventTask
from service.web.field_schemas import TEXT, Body
from service.web.file_schemas import FileFailure, FormBody
from service.web.operation_docs import body, links, reference, responses, usual_refusals
from service.web.parameters import STREAM_HEADERS, SUBMIT_HEADERS, headers, parameters
from service.web.routes.operation import Spec
from service.web.task_schemas import Submission

ABOUT = (
    "Submit a task and forget it: callbacks are proved, pictures are saved, events are delivered."
)
# The values of a submission's unknown fields.
ANY_JSON: JSON = {
    "description": "any JSON, at most 100 levels deep, without NUL characters",
    "anyOf": [
        {"type": ["null", "boolean", "number"]},
        TEXT,
        {"type": "array", "items": reference("AnyJson")},
        {"type": "object", "propertyNames": TEXT, "additionalProperties": reference("AnyJson")},
    ],
}


def document(specs: Sequence[Spec]) -> JSON:
    models: set[type[BaseModel]] = {Error, Event, EventTask, FileFailure}
    models.update(model for spec in specs for model in (spec.answer, spec.body) if model)
    ordered = sorted(models, key=lambda model: model.__name__)
    _, definitions = models_json_schema(
        [(model, "validation") for model in ordered], ref_template="#/components/schemas/{model}"
    )
    components: JSON = definitions["$defs"]
    for spec in specs:
        if spec.body and not issubclass(spec.body, Body | FormBody):
            further = {"additionalProperties": reference("AnyJson"), "propertyNames": TEXT}
            components[spec.body.__name__] |= further
    components["AnyJson"] = ANY_JSON
    paths: JSON = {}
    for spec in specs:
        paths.setdefault(spec.path, {})[spec.method.lower()] = operation(spec, tuple(specs))
    return {
        "openapi": "3.1.0",
        "info": {"title": "Darkroom", "version": VERSION, "description": ABOUT},
        "paths": paths,
        "components": {
            "schemas": components,
            "responses": usual_refusals(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def operation(spec: Spec, specs: tuple[Spec, ...]) -> JSON:
    given = parameters(spec.path, spec.query, re.findall(r"\{(\w+)\}", spec.path))
    if spec.body is Submission:
        given += headers(SUBMIT_HEADERS)
    if spec.path == "/v1/events":
        given += headers(STREAM_HEADERS)
    fields: JSON = {
        "operationId": spec.id,
        "summary": spec.summary,
        "parameters": given,
        "responses": responses(spec),
    }
    if onward := links(spec, specs):
        fields["responses"][str(spec.status)]["links"] = onward
    if spec.scopes:
        fields["security"] = [{"key": []}]
        fields["description"] = f"Needs the scope {' or '.join(spec.scopes)}."
    if spec.body:
        fields["requestBody"] = body(spec)
    return fields
