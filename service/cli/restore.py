"""`darkroom restore`: everything is checked and laid beside its place first, then put there by
renames, the database last.
"""

import asyncio
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.api_client import CommandFailed
from service.cli.backup import DATABASE, IMAGES, KEY, MANIFEST, Folder, embedded, summed
from service.cli.output import Json, plain, put_fields, put_json

if TYPE_CHECKING:
    from service.cli.manifest import Manifest
    from service.settings import Settings
    from service.upkeep.restoring import Restored


def restore(
    dir: Folder,
    force: Annotated[
        bool, typer.Option("--force", help="Set a store that is there aside; nothing is deleted.")
    ] = False,
    moved: Annotated[
        bool,
        typer.Option(
            "--moved",
            help=(
                "Nobody served the store since the backup, as when it moves: tasks that wait are"
                " submitted, none becomes uncertain."
            ),
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check a backup and put it back where the settings say. Nobody may serve there meanwhile."""
    from service.db.sqlite import FileLock
    from service.settings import load_settings

    settings = load_settings()
    path = embedded(settings)
    manifest = manifest_of(dir, settings)
    if moved and manifest.served:
        raise CommandFailed(
            "the store was served while this backup was made, so it went on after it: restore"
            " without --moved"
        )
    lock = FileLock(path.with_name(path.name + ".lock"))
    if not lock.acquire():
        raise CommandFailed(f"another darkroom process uses {path}: stop it first")
    try:
        done = put_back(dir, manifest, settings, path, force=force, moved=moved)
    finally:
        lock.release()
    if as_json:
        put_json(done)
    else:
        put_fields(done)


def manifest_of(folder: Path, settings: "Settings") -> "Manifest":
    """The backup's account of itself; CommandFailed: it is none, or for other settings."""
    from pydantic import ValidationError

    from service.cli.manifest import FORMAT, Manifest

    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise CommandFailed(f"{folder} is no whole backup: it has no {MANIFEST}") from None
    except ValidationError as error:
        raise CommandFailed(
            f"{folder / MANIFEST} is no backup's manifest: {plain(error.errors()[0]['msg'])}"
        ) from None
    if manifest.format != FORMAT or not {DATABASE} <= manifest.files.keys() <= {DATABASE, KEY}:
        raise CommandFailed(
            f"{folder / MANIFEST} was written by another version of darkroom,"
            f" {plain(manifest.darkroom)}"
        )
    if KEY not in manifest.files and not settings.secret_key:
        raise CommandFailed(
            "the backup holds no key: DARKROOM_SECRET_KEY must be the one the store was used with"
        )
    here = None if settings.blob_url.startswith("file:") else settings.blob_url
    if manifest.images.kept_at != here:
        raise CommandFailed(
            f"the backup's images are in {plain(manifest.images.kept_at or 'its folder')}:"
            " DARKROOM_BLOB_URL does not fit"
        )
    return manifest


def put_back(
    folder: Path,
    manifest: "Manifest",
    settings: "Settings",
    path: Path,
    *,
    force: bool,
    moved: bool,
) -> dict[str, Any]:
    """What was done, in fields for people and programs. Before the first rename nothing of what was
    there is touched.
    """
    from service.db.clock import wall_clock
    from service.ids import rfc3339, sequence_text

    with_images = manifest.images.kept_at is None
    known = there(settings, path)
    if known and not force:
        raise CommandFailed(f"{known[0]} is there already: --force sets aside what is there")
    with (
        staging(path.parent, path.name, path) as store,
        staging(settings.data_dir, KEY) as key,
        staging(settings.image_dir, IMAGES) as images,
    ):
        for name, place in ((DATABASE, store), (KEY, key)):
            if name in manifest.files:
                (place / name).touch(0o600)
                if summed(folder / name, place / name) != (
                    manifest.files[name].bytes,
                    manifest.files[name].sha256,
                ):
                    raise CommandFailed(f"{folder / name} is not what the backup's manifest says")
        restored = servable(store / DATABASE, key, manifest, settings, moved=moved)
        count = (
            copied_images(folder / IMAGES, images, store / DATABASE, manifest.images.lost)
            if with_images
            else 0
        )
        if (store / f"{DATABASE}-wal").exists():  # the file alone is put in place
            raise CommandFailed("the restored database could not be written out")
        os.sync()
        aside = set_aside(known, rfc3339(wall_clock()).replace(":", ""))
        for entry in images.iterdir():
            entry.rename(settings.image_dir / entry.name)
        if KEY in manifest.files:
            (key / KEY).rename(settings.data_dir / KEY)
        os.sync()
        (store / DATABASE).rename(path)
        os.sync()
    return {
        "restored": str(path),
        "made_at": rfc3339(milliseconds(manifest)),
        "tasks": manifest.tasks,
        "images": count,
        "uncertain": restored.uncertain,
        "events_go_on_after": sequence_text(restored.sequence),
        "set_aside": aside,
    }


def there(settings: "Settings", path: Path) -> list[Path]:
    """What the renames would meet: the database with what belongs to it, the key, images."""
    files = [
        path,
        *(path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal")),
        settings.data_dir / KEY,
    ]
    folder = settings.image_dir if settings.blob_url.startswith("file:") else None
    images = (
        sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        if folder and folder.exists()
        else []
    )
    return [file for file in files if file.exists()] + images


@contextmanager
def staging(place: Path, name: str, store: Path | None = None) -> Iterator[Path]:
    """A folder beside where something goes, on the same file system; gone at the exit, as is what a
    killed restoration left of it.

    But the one beside a `store` that was there, or was to be, and is not: a start is told by it
    that a restoration was broken off.
    """
    from service.db.integrity import RESTORING

    folder = place / (RESTORING + name)
    awaited = store is not None and (store.exists() or folder.exists())
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for left in folder.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    try:
        yield folder
    finally:
        if store is None or not awaited or store.exists():
            shutil.rmtree(folder, ignore_errors=True)


def servable(
    database: Path, key: Path, manifest: "Manifest", settings: "Settings", *, moved: bool
) -> "Restored":
    """Checks and migrates the copy, and marks what may have happened since; ConfigurationError:
    damaged, newer, or under another key.
    """
    from service.backends import open_store, secret_keys
    from service.db.snapshot import check_database, secrets
    from service.ops import logging
    from service.signing import Keyring
    from service.upkeep.restoring import Restoration, restore_stores

    logging.configure("console", "warning", sys.stderr)
    check_database(database, "the backup's database")
    keyring = Keyring(secret_keys(settings.model_copy(update={"data_dir": key})))
    wait, give_up = (
        round(seconds * 1000) for seconds in (settings.uncertain_after_s, settings.submit_give_up_s)
    )
    restoration = Restoration(milliseconds(manifest), wait, give_up, moved)

    async def act() -> "Restored":
        async with open_store(
            settings.model_copy(update={"database_url": f"sqlite:///{database}", "migrate": "on"})
        ) as store:
            for secret in await store.read(secrets):
                keyring.decrypt(secret)
            return await store.write(restore_stores, restoration)

    return asyncio.run(act())


def milliseconds(manifest: "Manifest") -> int:
    return round(manifest.made_at.timestamp() * 1000)


def copied_images(source: Path, target: Path, database: Path, lost: Sequence[str]) -> int:
    """Copies every image the database names and checks its sum; how many. CommandFailed: one is
    missing that was not `lost` before.
    """
    from service.blobs.base import check_name
    from service.db.snapshot import reading, stored_images

    count = 0
    with reading(database) as connection:
        for image in stored_images(connection):
            if image.blob in lost:
                continue
            name = check_name(image.blob)
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                good = summed(source / name, target / name) == (image.bytes, image.sha256)
            except FileNotFoundError:
                good = False
            if not good:
                raise CommandFailed(f"the backup's image {name} is missing or damaged")
            count += 1
    return count


def set_aside(known: list[Path], time: str) -> list[str]:
    """Moves what is there into folders beside it; where it is now. What begins with a dot is no
    image to the service.
    """
    aside = []
    for path in known:
        place = path.parent / f".before-{time}"
        place.mkdir(mode=0o700, exist_ok=True)
        path.rename(place / path.name)
        aside.append(str(place))
    return sorted(set(aside))
