"""Bodies of forms, urlencoded or multipart, read only with the session's CSRF token."""

import asyncio
import hmac
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

from starlette.requests import ClientDisconnect, Request

from service.errors import ApiError, invalid_request
from service.net.multipart import FormPart, MultipartForm
from service.strict_json import check_text
from service.web.context import context_of
from service.web.key_shares import address_of
from service.web.sessions import Session

CSRF, CSRF_HEADER = "csrf", "x-csrf-token"
MAX_FORM, MAX_FILES_FORM, MAX_FIELDS = 1 << 20, 80 << 20, 1000
FORM_S, FILES_S = 30.0, 300.0


@dataclass(slots=True)
class FormFields:
    """The fields of a form. A file's field is the id of the stored file, or in `refused`."""

    pairs: list[tuple[str, str]] = field(default_factory=list)
    refused: list[ApiError] = field(default_factory=list)

    def get(self, name: str, default: str = "") -> str:
        """The last value of a field, without blanks around it."""
        return next((value for key, value in reversed(self.pairs) if key == name), default).strip()

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.pairs if key == name and value]


Keep = Callable[[FormFields, str | None, AsyncIterator[bytes]], Awaitable[str]]


async def read_form(request: Request, session: Session, key: str, keep: Keep) -> FormFields:
    """`keep` stores a file and returns its id. Raises ApiError, for a wrong token 403."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    files = kind == "multipart/form-data"
    if not files and kind != "application/x-www-form-urlencoded":
        raise ApiError(415, "unsupported_media_type", "the body must be a form")
    shedder, address = context_of(request).shedder, address_of(request.scope.get("client"))
    shares, entry = shedder.bodies, request.state.body
    try:
        async with asyncio.timeout(FILES_S if files else FORM_S) as timer:
            with shedder.idle(), shares.arriving(entry, key, address, timer):
                most = MAX_FILES_FORM if files else MAX_FORM
                async with aclosing(limited(request, most)) as chunks:
                    return await (
                        multipart(request, session, chunks, keep)
                        if files
                        else urlencoded(request, session, chunks)
                    )
    except (TimeoutError, ClientDisconnect):
        raise ApiError(408, "timeout", "the form was not complete in time") from None
    except ValueError as error:
        raise invalid_request(f"the form cannot be read: {error}") from None


async def limited(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if not request.headers.get("content-type", "").startswith("multipart"):
            context_of(request).shedder.bodies.grow(request.state.body, len(chunk))
        if size > most:
            raise ApiError(413, "body_too_large", f"a form has at most {most} bytes")
        yield chunk


async def urlencoded(request: Request, session: Session, body: AsyncIterator[bytes]) -> FormFields:
    text = b"".join([chunk async for chunk in body]).decode("ascii")
    pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS)
    form = FormFields()
    for name, value in pairs:
        add(form, name, value)
    check_token(request, session, form)
    return form


async def multipart(
    request: Request, session: Session, chunks: AsyncIterator[bytes], keep: Keep
) -> FormFields:
    form = FormFields()
    body = MultipartForm(request.headers.get("content-type", ""), chunks)
    async with aclosing(body.parts()) as parts:
        async for part in parts:
            if part.name == CSRF:
                add(form, CSRF, await text_of(part))
                continue
            check_token(request, session, form)
            if part.filename is None:
                add(form, part.name, await text_of(part))
            elif part.filename:  # a field without a chosen file has an empty name
                try:
                    add(form, part.name, await keep(form, part.filename, part.content))
                except ApiError as error:
                    if error.status not in (400, 413):
                        raise
                    form.refused.append(error)
    check_token(request, session, form)
    return form


async def text_of(part: FormPart) -> str:
    content = bytearray()
    async for piece in part.content:
        content += piece
        if len(content) > MAX_FORM:
            raise ApiError(413, "body_too_large", f"a field has at most {MAX_FORM} bytes")
    return content.decode()


def add(form: FormFields, name: str, value: str) -> None:
    check_text(name)
    check_text(value)
    form.pairs.append((name, value.replace("\r\n", "\n")))
    if len(form.pairs) > MAX_FIELDS:
        raise ValueError(f"it has more than {MAX_FIELDS} fields")


def check_token(request: Request, session: Session, form: FormFields) -> None:
    given = request.headers.get(CSRF_HEADER) or form.get(CSRF)
    if not hmac.compare_digest(given.encode(), session.csrf.encode()):
        raise ApiError(403, "csrf_failed", "the form is not of this session: load the page again")
