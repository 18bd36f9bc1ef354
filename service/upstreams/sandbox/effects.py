"""The effects of faults on tasks, documents and responses."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from service.strict_json import JSON
from service.upstreams.base import Status
from service.upstreams.sandbox.answers import Answer, ErrorPage, encoded
from service.upstreams.sandbox.forgeries import FORGERIES


@dataclass(frozen=True, slots=True)
class TaskEnd:
    """The end of a task: its images, or an error."""

    status: Status
    images: int = 0
    error: JSON | None = None


@dataclass(frozen=True, slots=True)
class CountedRequest:
    """A request for a task or a file: the number of the same requests before it, and its path."""

    before: int
    path: str


TASK_ERRORS: Mapping[str, str] = {
    "content_policy_violation": "The prompt or an image violates the content policy.",
    "invalid_parameters": "The parameters are invalid.",
    "image_processing_error": "An input image could not be processed.",
    "image_dimension_mismatch": "The input images' dimensions do not match the request.",
    "request_cancelled": "The request was cancelled.",
    "service_error": "The service failed internally.",
    "generation_timeout": "The generation took too long.",
    "resource_exhausted": "No capacity is left for this request.",
    "quota_exceeded": "The quota is exceeded.",
    "service_unavailable": "The service is unavailable for now.",
    "generation_failed_no_content": "The generation brought no content.",
    "unknown_error": "An unknown error occurred.",
    "resource_not_found": "The resource does not exist or is gone.",
}


def failed(code: str) -> TaskEnd:
    error = {"code": code, "message": TASK_ERRORS[code], "type": "task_error"}
    return TaskEnd(Status.FAILED, error=error)


def without(document: JSON, *fields: str) -> JSON:
    return {name: value for name, value in document.items() if name not in fields}


def contradicting(truth: JSON) -> JSON:
    """A terminal document that says the opposite of the true one."""
    bare = without(truth, "results", "result_data", "error", "usage")
    if truth["status"] == Status.COMPLETED:
        return bare | {"status": "failed", "progress": 0, "error": failed("service_error").error}
    results = ["https://files.evolink.ai/contradiction/0.png"]
    return bare | {"status": "completed", "progress": 100, "results": results}


def cancelled(form: str, _: TaskEnd) -> TaskEnd:
    return TaskEnd(Status.CANCELLED) if form == "status" else failed("request_cancelled")


def shaped(form: str, document: JSON) -> JSON:
    """The results in a form that only the code of clients documents."""
    if "results" not in document:
        return document
    links = document["results"]
    if form == "text":
        return document | {"results": links[0] if len(links) == 1 else links}
    if form == "padded":
        return document | {"results": [f" {link}\r\n" for link in links]}
    if form == "objects":
        return document | {"results": [{"url": link} for link in document["results"]]}
    data = [{"image_url": link} for link in document["results"]]
    return without(document, "results") | {"result_data": data}


def unnamed(body: bytes) -> bytes:
    """A document without the results that it has."""
    document = json.loads(body)
    return encoded(document | {"results": []} if document.get("results") else document)


UNUSABLE: Mapping[str, bytes] = {
    "surrogate": rb'"note":"cut \ud83d"',
    "nul": rb'"note":"a\u0000b"',
    "nan": b'"score":NaN',
    "digits": b'"seed":' + b"9" * 5000,
    "latin_1": b'"note":"caf\xe9"',
    "twice": b'"note":1,"note":2',
}


def spoiled(name: str, body: bytes) -> bytes:
    """The document with one more field that Darkroom does not need and a strict parser refuses."""
    return body[:-1] + b"," + UNUSABLE[name] + b"}"


def in_body(change: Callable[..., bytes]) -> Callable[..., Answer]:
    """A function that changes the body of a good answer, its last argument."""
    return lambda value, *rest: (
        rest[-1] if rest[-1].status != 200 else replace(rest[-1], body=change(value, rest[-1].body))
    )


def billed(credits: str | float, document: JSON) -> JSON:
    if credits == "absent":
        return without(document, "usage")
    if "credits_used" not in document.get("usage", {}):
        return document
    return document | {"usage": document["usage"] | {"credits_used": credits}}


def with_field(name: str) -> Callable[..., Answer]:
    """A function that sets a field of the answer, its last argument, to the fault's value."""
    return lambda value, *rest: replace(rest[-1], **{name: value})


def error_page(page: ErrorPage, request: CountedRequest, answer: Answer) -> Answer:
    return page.answer(request.before) or answer


def forged(name: str, _: CountedRequest, answer: Answer) -> Answer:
    if answer.status != 200:
        return answer
    body, type = FORGERIES[name](answer.body, answer.headers["content-type"])
    return replace(answer, body=body, headers={**answer.headers, "content-type": type})


def typed(type: str, _: CountedRequest, answer: Answer) -> Answer:
    others = without(dict(answer.headers), "content-type")
    return replace(answer, headers=others if type == "absent" else others | {"content-type": type})


# Targets of redirects, before the path of the file: the file itself, a host that does not exist, a
# private address, the link itself.
REDIRECTS: Mapping[str, str] = {
    "path": "/moved",
    "host": "https://results.example",
    "private": "http://10.0.0.1",
    "loop": "/files",
}


def redirected(target: str, request: CountedRequest, answer: Answer) -> Answer:
    if answer.status != 200 or request.path.startswith("/moved/"):
        return answer
    if target in REDIRECTS:
        target = REDIRECTS[target] + request.path.removeprefix("/files")
    return Answer(302, b"", {"location": target})
