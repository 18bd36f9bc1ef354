"""The OpenAPI 3.1 document, made from the table of routes and the pydantic models."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service import VERSION
from service.strict_json import JSON
from service.web import schemas
from service.web.event_schemas import Event, EventTask
from service.web.file_schemas import FormBody

if TYPE_CHECKING:
    from service.web.routes.table import Spec

SUBMIT_HEADERS = ("Idempotency-Key", "Prefer")
ABOUT = (
    "Submit a task and forget it: callbacks are proved, pictures are saved, events are delivered."
)


def document(specs: "Sequence[Spec]") -> JSON:
    models: set[type[BaseModel]] = {schemas.Error, Event, EventTask}
    models.update(model for spec in specs for model in (spec.answer, spec.body) if model)
    ordered = sorted(models, key=lambda model: model.__name__)
    _, definitions = models_json_schema(
        [(model, "validation") for model in ordered], ref_template="#/components/schemas/{model}"
    )
    paths: JSON = {}
    for spec in specs:
        paths.setdefault(spec.path, {})[spec.method.lower()] = operation(spec)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Darkroom", "version": VERSION, "description": ABOUT},
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def operation(spec: "Spec") -> JSON:
    parameters = [_parameter(name, "path") for name in re.findall(r"\{(\w+)\}", spec.path)]
    parameters += [_parameter(name, "query") for name in spec.query]
    if spec.body is schemas.Submission:
        parameters += [_parameter(name, "header") for name in SUBMIT_HEADERS]
    success: JSON = {"description": spec.summary}
    if spec.answer:
        success["content"] = _content(spec.answer.__name__)
    failure = {"description": "An error", "content": _content("Error")}
    document: JSON = {
        "operationId": spec.endpoint.__module__.rsplit(".", 1)[-1] + "_" + spec.endpoint.__name__,
        "summary": spec.summary,
        "parameters": parameters,
        "responses": {str(spec.status): success, "default": failure},
    }
    if spec.scopes:
        document["security"] = [{"key": []}]
        document["description"] = f"Needs the scope {' or '.join(spec.scopes)}."
    if spec.body:
        content = _content(spec.body.__name__)
        if issubclass(spec.body, FormBody):
            content = {"multipart/form-data": content["application/json"]}
        document["requestBody"] = {"required": True, "content": content}
    return document


def _parameter(name: str, place: str) -> JSON:
    return {"name": name, "in": place, "required": place == "path", "schema": {"type": "string"}}


def _content(name: str) -> JSON:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
