"""Resolves the entries of `image_urls`: which stored image each names, or that it is a link which
the upstream fetches itself.
"""

import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from sqlalchemy import Connection, select

from service.db.tables import images
from service.errors import ApiError, EgressRefused
from service.images.downloads import shown_image
from service.images.input_files import InputFiles
from service.links import data_of, is_data, trimmed
from service.strict_json import off_loop
from service.tasks.files import FileRow, InputImage, NamedInput, stored_file
from service.tasks.rows import ImageRow
from service.upstreams.catalogue import Catalogue
from service.upstreams.catalogue_fields import ImagesField
from service.upstreams.catalogue_images import image_complaint, too_long

FILE_ID, IMAGE_ID = r"file_[a-z2-7]{26}", r"img_[a-z2-7]{26}"
OWN_ID = re.compile(f"{FILE_ID}|{IMAGE_ID}")
ORIGIN = re.compile("^[^/]*//[^/]*")  # scheme and host, whose case does not count
PARAM = "image_urls"
LARGE = 1 << 16  # characters of a data: URL that a thread decodes
ACCEPTED = "a public https link, file_…, img_…, a link of this service, or a data: URL of an image"


@dataclass(frozen=True, slots=True)
class InputResolver:
    """`check_link` raises EgressRefused for a link that is not public by its text."""

    files: InputFiles
    catalogue: Catalogue
    check_link: Callable[[str], None]

    async def resolve(
        self, owner: str, entries: list[str], model: str, mask: str | None = None
    ) -> list[NamedInput]:
        """The inputs in their order, within the limits of the model, and last the mask if the
        service keeps it. Raises ApiError 400 with the place of the entry.
        """
        rule, named = self.catalogue.image_rule(model), list[NamedInput]()
        try:
            for place, entry in enumerate(entries):
                named.append(await self._one(owner, entry, f"{PARAM}[{place}]", rule))
            if mask is not None and await self._is_kept(trimmed(mask)):
                rule = rule.model_copy(update={"alpha": True})  # a mask is often transparent
                named.append(await self._one(owner, mask, "mask_url", rule))
        except ApiError:
            await self.discard(owner, named)
            raise
        return named

    async def discard(self, owner: str, named: Sequence[NamedInput]) -> None:
        """Erases the files that `data:` URLs of a refused submission made."""
        for each in named:
            if each.made:
                await self.files.erase(each.stored, owner)

    async def _one(self, owner: str, entry: str, place: str, rule: ImagesField) -> NamedInput:
        text = trimmed(entry)
        if is_data(text):
            return await self._data(owner, text, place, rule)
        name = await self._own_name(text)
        if re.fullmatch(FILE_ID, name):
            return await self._file(owner, name, entry, place, rule)
        if re.fullmatch(IMAGE_ID, name):
            return await self._result(owner, name, entry, place, rule)
        try:
            self.check_link(text)
        except EgressRefused as error:
            raise refusal(f"{place}: {entry[:100]!r} is not {ACCEPTED}: {error}") from None
        return NamedInput(InputImage(url=text), entry, entry)

    async def _is_kept(self, text: str) -> bool:
        """Whether an entry names an image of the service, or has one in it."""
        return is_data(text) or bool(OWN_ID.fullmatch(await self._own_name(text)))

    async def _own_name(self, text: str) -> str:
        """The id in a link of this service. Any other text stays as it is."""
        links, bare = self.files.resources.links, re.split("[?#]", text, maxsplit=1)[0]
        bare, base = origin_lowered(bare), re.escape(origin_lowered(links.base_url))
        own = rf"{base}/images/({IMAGE_ID})(?:\.[a-z]+)?|{base}/v1/files/({FILE_ID})(?:/content)?"
        if match := re.fullmatch(own, bare):
            return match[1] or match[2]
        prefix = origin_lowered(f"{links.image_base_url}/")
        if links.image_base_url and bare.startswith(prefix):
            blob = bare.removeprefix(prefix)
            return await self.files.resources.store.read(image_of_blob, blob) or text
        return text

    async def _data(self, owner: str, url: str, place: str, rule: ImagesField) -> NamedInput:
        try:
            content = await off_loop(len(url) > LARGE, partial(data_of, url))
        except ValueError as error:
            raise refusal(f"{place}: {error}") from None
        try:
            row = await self.files.keep(owner, lambda: None, once(content), rule, param=place)
        except ApiError as error:
            raise as_refusal(error) from None
        return NamedInput(of_row(row), row.id, row.id, made=True)

    async def _file(
        self, owner: str, file_id: str, entry: str, place: str, rule: ImagesField
    ) -> NamedInput:
        store = self.files.resources.store
        row = await store.read(stored_file, file_id, owner, store.clock())
        if row is None:
            raise refusal(f"{place}: {file_id} is no file of yours, or it was erased")
        if reason := image_complaint(rule, row):
            raise refusal(f"{place}: {reason}")
        return NamedInput(of_row(row), file_id, entry)

    async def _result(
        self, owner: str, image_id: str, entry: str, place: str, rule: ImagesField
    ) -> NamedInput:
        resources = self.files.resources
        row = await resources.store.look_up(shown_image, image_id)
        if row is None or row.owner != owner or row.state != "stored" or row.blob is None:
            raise refusal(f"{place}: {image_id} is no stored image of yours, or it was erased")
        if row.bytes is not None and row.bytes > (most := self.files.most(rule)):
            raise refusal(f"{place}: {too_long(most, row.bytes)}")
        async with resources.blobs.incoming() as file:
            async for chunk in resources.blobs.read(row.blob):
                await file.write(chunk)
            try:
                await self.files.check(file, rule, place)
            except ApiError as error:
                raise as_refusal(error) from None
        return NamedInput(of_row(row), image_id, entry)


def origin_lowered(url: str) -> str:
    return ORIGIN.sub(lambda origin: origin[0].lower(), url)


async def once(content: bytes) -> AsyncIterator[bytes]:
    yield content


def of_row(row: FileRow | ImageRow) -> InputImage:
    return InputImage(id=row.id, sha256=row.sha256, width=row.width, height=row.height)


def image_of_blob(connection: Connection, blob: str) -> str | None:
    task_id = blob.partition("/")[0]  # which has an index
    statement = select(images.c.id).where(images.c.blob == blob, images.c.task_id == task_id)
    return connection.execute(statement).scalar()


def refusal(message: str) -> ApiError:
    """A message begins with the place of the entry."""
    param = re.split(r"[\[:]", message, maxsplit=1)[0]
    return ApiError(400, "invalid_parameter", message, param=param)


def as_refusal(error: ApiError) -> ApiError:
    """The refusal of a file as that of a submission. A lack of space stays what it is."""
    return error if error.status >= 500 else refusal(error.message)
