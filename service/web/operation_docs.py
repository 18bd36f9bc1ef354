"""The responses and links of each operation, beside its answer in the table of routes."""

from collections.abc import Mapping

from service.strict_json import JSON
from service.web.field_schemas import OptionalBody
from service.web.file_schemas import FormBody
from service.web.routes.operation import Spec

REASONS: Mapping[str, str] = {
    "400": "The request is malformed or breaks a limit. `param` names the field.",
    "401": "The key is missing, unknown or revoked.",
    "402": "The owner's budget is too small.",
    "403": "The key lacks the scope or may not name this owner.",
    "404": "Nothing of the key's owner has that id.",
    "408": "The body was not complete in time.",
    "409": "The request contradicts the present state.",
    "410": "The image was erased.",
    "413": "The body is too large.",
    "415": "The body has another media type, or a content coding.",
    "416": "The image has no such range.",
    "422": "A limit of the owner or of the upstream is reached.",
    "429": "A limit of requests is reached.",
    "4XX": "The upstream's own refusal, with its status.",
    "503": "The service is overloaded, or what it needs does not respond.",
}
# Statuses of refusals that only some operations have.
FURTHER: Mapping[str, str] = {
    "POST /v1/images/generations": "402 404 409 4XX",
    "GET /v1/images/generations/{task_id}": "400",
    "POST /v1/tasks/{task_id}/cancel": "409",
    "DELETE /v1/tasks/{task_id}": "409",
    "POST /v1/tasks/{task_id}/reconcile": "409",
    "POST /v1/tasks/{task_id}/resolve": "409",
    "GET /v1/ledger": "404",
    "GET /v1/audit": "404",
    "GET /v1/credits": "4XX",
    "GET /v1/models": "4XX",
    "POST /v1/endpoints": "422",
    "POST /v1/endpoints/{endpoint_id}/rotate": "409",
    "POST /v1/endpoints/{endpoint_id}/replay": "409",
    "POST /v1/replays": "404 409",
    "GET /v1/deliveries/{delivery_id}/request": "409",
    "POST /v1/deliveries/{delivery_id}/retry": "409",
    "POST /v1/keys/rotate-secret": "404 409",
    "GET /images/{image_id}": "403 410 416",
}
# Of operations that have no JSON of their own, or further forms of the answer beside it.
ANY: JSON = {"schema": {}}
IMAGES = {
    f"image/{kind}": {"schema": {"type": "string", "format": "binary"}}
    for kind in ("png", "jpeg", "webp", "gif", "avif", "bmp")
}
MEDIA: Mapping[str, JSON] = {
    "GET /v1/credits": {"application/json": ANY},
    "GET /v1/models": {"application/json": ANY},
    "GET /v1/events": {"text/event-stream": {"schema": {"type": "string"}}},
    "GET /v1/usage": {"text/csv": {"schema": {"type": "string"}}},
    "GET /v1/files/{file_id}/content": IMAGES,
    "GET /images/{image_id}": IMAGES,
    "GET /metrics": {"text/plain": {"schema": {"type": "string"}}},
    "GET /openapi.json": {"application/json": {"schema": {"type": "object"}}},
    "GET /asyncapi.json": {"application/json": {"schema": {"type": "object"}}},
}
# A task that was not submitted here comes in the upstream's own words.
PASSED_ON: JSON = {
    "type": "object",
    "required": ["id"],
    "properties": {"id": {"type": "string", "pattern": "^task-unified-"}},
    "not": {"required": ["state"]},
}
PASSING = ("GET /v1/tasks/{task_id}", "GET /v1/images/generations/{task_id}")
# Operations with refusals in the form of the upstream's file API, beside ours.
THEIRS = "/api/v1/files/"
NOT_MODIFIED = ("/images/{image_id}", "/openapi.json", "/asyncapi.json")
TEXT_HEADER = {"schema": {"type": "string"}}
REQUEST_ID = {"X-Request-Id": {**TEXT_HEADER, "required": True}}
RETRY = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "required": True}}
HEADERS: Mapping[str, JSON] = {
    "401": {"WWW-Authenticate": {**TEXT_HEADER, "required": True}},
    "429": RETRY,
    "503": RETRY,
    "416": {"Content-Range": {**TEXT_HEADER, "required": True}},
}
SUBMIT_HEADERS: JSON = {
    "Preference-Applied": TEXT_HEADER,
    "Idempotency-Replayed": {"schema": {"const": "true"}},
}


def reference(name: str) -> JSON:
    return {"$ref": f"#/components/schemas/{name}"}


def responses(spec: Spec) -> JSON:
    """All responses of an operation: its answer, and every refusal with its form."""
    operation = f"{spec.method} {spec.path}"
    success: JSON = {"description": spec.summary, "headers": dict(REQUEST_ID)}
    content: JSON = dict(MEDIA.get(operation, {}))
    if spec.answer:
        schema = reference(spec.answer.__name__)
        if operation in PASSING:
            schema = {"anyOf": [schema, PASSED_ON]}
        content = {"application/json": {"schema": schema}, **content}
    if content:
        success["content"] = content
    if operation == "POST /v1/images/generations":
        success["headers"] |= SUBMIT_HEADERS
    answers = {str(spec.status): success}
    if spec.path in NOT_MODIFIED:
        answers["304"] = {"description": "The client has it already.", "headers": REQUEST_ID}
    if spec.path == "/images/{image_id}":
        answers["206"] = {**success, "description": "The asked range of the image."}
    for status in statuses(spec):
        answers[status] = refusal(spec, status)
    return answers


def statuses(spec: Spec) -> list[str]:
    """The statuses of refusals. Every operation refuses unknown parameters and content codings."""
    codes = {"400", "415", "503", *FURTHER.get(f"{spec.method} {spec.path}", "").split()}
    if spec.scopes:
        codes |= {"401", "403", "429"}
    if "{" in spec.path:
        codes.add("404")
    if spec.body:
        codes |= {"408", "413"}
    return sorted(codes)


def refusal(spec: Spec, status: str) -> JSON:
    """A reference to the usual form, or a form of the operation's own."""
    if spec.path.startswith(THEIRS) and status in ("400", "404", "413", "415", "429"):
        schema: JSON = {"anyOf": [reference("Error"), reference("FileFailure")]}
        return refused(status, schema, {} if status == "429" else HEADERS.get(status, {}))
    if spec.path == "/readyz" and status == "503":
        return refused(status, reference("Readiness"), RETRY)
    return {"$ref": f"#/components/responses/{status}"}


def refused(status: str, schema: JSON, headers: JSON) -> JSON:
    content = {"application/json": {"schema": schema}}
    return {"description": REASONS[status], "headers": REQUEST_ID | headers, "content": content}


def usual_refusals() -> JSON:
    return {each: refused(each, reference("Error"), HEADERS.get(each, {})) for each in REASONS}


# What an item of an answer fills: parameters of other operations, each with the place of its value.
FILLS: Mapping[str, Mapping[str, str]] = {
    "Task": {"task_id": "id", "image_id": "images/0/id"},
    "CancelledTask": {"task_id": "id", "image_id": "images/0/id"},
    "Endpoint": {"endpoint_id": "id"},
    "EndpointWithSecret": {"endpoint_id": "id"},
    "Delivery": {"delivery_id": "id", "event": "event"},
    "Counted": {"replay_id": "id"},
    "Replay": {"replay_id": "id"},
    "File": {"file_id": "id"},
    "CreatedKey": {"key_id": "id"},
    "Key": {"key_id": "id"},
    "OwnersBudget": {"owner": "owner"},
    "CatalogueModel": {"model": "model"},
    "EventPage": {"event": "data/0/id", "after": "next_after"},
}
QUERIES: Mapping[str, str] = {"task": "task_id", "endpoint": "endpoint_id"}


def sources(spec: Spec) -> dict[str, str]:
    """Parameters that the answer fills, each with the expression of its value."""
    name = spec.answer.__name__ if spec.answer else ""
    kind, prefix = name.removesuffix("List"), "data/0/" if name.endswith("List") else ""
    filled = {each: f"{prefix}{value}" for each, value in FILLS.get(kind, {}).items()}
    if prefix:
        filled["after" if name == "EntryList" else "cursor"] = "next_cursor"
    return {each: f"$response.body#/{value}" for each, value in filled.items()}


def links(spec: Spec, specs: tuple[Spec, ...]) -> JSON:
    """Links to the operations that take what the answer has."""
    given, targets = sources(spec), {}
    for target in specs:
        if target.path.startswith(THEIRS) and not spec.path.startswith(THEIRS):
            continue  # another API for the same files
        named = {name: given[name] for name in given if "{" + name + "}" in target.path}
        asked = {
            query: given[QUERIES.get(query, query)]
            for query in target.query
            if QUERIES.get(query, query) in given
            and (query not in ("cursor", "after") or target is spec)
        }
        values = named if "{" in target.path else asked
        if values and not (target is spec and named):
            expressions = {
                f"{'path' if name in named else 'query'}.{name}": value
                for name, value in values.items()
            }
            targets[target.id] = {"operationId": target.id, "parameters": expressions}
    return targets


def body(spec: Spec) -> JSON:
    assert spec.body is not None
    form = issubclass(spec.body, FormBody)
    media: JSON = {"schema": reference(spec.body.__name__)}
    if form:
        media["encoding"] = {"file": {"contentType": "image/png, image/jpeg, image/webp"}}
    name = "multipart/form-data" if form else "application/json"
    return {"required": not issubclass(spec.body, OptionalBody), "content": {name: media}}
