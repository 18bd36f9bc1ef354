"""`darkroom restore`: checks a copy beside its final place, then renames it, the database last."""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from service.cli.api_client import CommandFailed
from service.cli.backup import DATABASE, IMAGES, KEY, MANIFEST, Folder, clear, embedded, summed
from service.cli.output import Json, option, plain, show

if TYPE_CHECKING:
    from service.cli.manifest import Manifest
    from service.settings import Settings
    from service.upkeep.restoring import Restored


def restore(
    dir: Folder,
    force: Annotated[
        bool, option("Move an existing store aside. Nothing is deleted.", "--force")
    ] = False,
    moved: Annotated[
        bool,
        option(
            "The store moves, and no process served it since the backup: waiting tasks are"
            " submitted and do not become uncertain.",
            "--moved",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check a backup and put it where the settings say. The service must be stopped."""
    from service.db.file_lock import store_lock
    from service.folders import keep_private
    from service.settings import load_settings

    keep_private()
    settings = load_settings()
    path = embedded(settings)
    manifest = read_manifest(dir, settings)
    if moved and manifest.served:
        raise CommandFailed(
            "the store was served while this backup was made, so it went on after it: restore"
            " without --moved"
        )
    with store_lock(path) as alone:
        if not alone:
            raise CommandFailed(f"another darkroom process uses {path}: stop it first")
        show(put_back(dir, manifest, settings, path, force=force, moved=moved), as_json)


def read_manifest(folder: Path, settings: "Settings") -> "Manifest":
    """The manifest. CommandFailed: there is none, or it does not fit these settings."""
    from pydantic import ValidationError

    from service.cli.manifest import FORMAT, Manifest

    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise CommandFailed(f"{folder} is no whole backup: it has no {MANIFEST}") from None
    except ValidationError as error:
        reason = plain(error.errors()[0]["msg"])
        raise CommandFailed(f"{path} is no backup's manifest: {reason}") from None
    if manifest.format != FORMAT or not {DATABASE} <= manifest.files.keys() <= {DATABASE, KEY}:
        raise CommandFailed(
            f"{path} was written by another version of darkroom, {plain(manifest.darkroom)}"
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
    """Restores, and returns a report. No existing file is touched before the first rename."""
    from service.db.clock import wall_clock
    from service.ids import rfc3339, sequence_text

    existing = existing_files(settings, path)
    if existing and not force:
        raise CommandFailed(f"{existing[0]} is there already: --force sets aside what is there")
    with (
        staging(path.parent, path.name, path) as store,
        staging(settings.data_dir, KEY) as key,
        staging(settings.image_dir, IMAGES) as images,
    ):
        copy_files(folder, manifest, {DATABASE: store, KEY: key})
        restored = prepare(store / DATABASE, key, manifest, settings, moved=moved)
        count = 0
        if manifest.images.kept_at is None:
            count = copy_images(folder / IMAGES, images, store / DATABASE, manifest.images.lost)
        if (store / f"{DATABASE}-wal").exists():  # only the database file is renamed
            raise CommandFailed("the restored database could not be written out")
        os.sync()
        aside = set_aside(existing, rfc3339(wall_clock()).replace(":", ""))
        for entry in images.iterdir():
            entry.rename(settings.image_dir / entry.name)
        if KEY in manifest.files:
            (key / KEY).rename(settings.key_file)
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


def existing_files(settings: "Settings", path: Path) -> list[Path]:
    """The database with its journals, the key, and the images that are there."""
    beside = [path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal")]
    files = [file for file in (path, *beside, settings.key_file) if file.exists()]
    if settings.blob_url.startswith("file:") and settings.image_dir.exists():
        images = (entry for entry in settings.image_dir.iterdir() if entry.name[0] != ".")
        files += sorted(images)
    return files


@contextmanager
def staging(parent: Path, name: str, store: Path | None = None) -> Iterator[Path]:
    """An empty folder beside the final place, on the same file system. It is removed at the end.

    The folder beside a `store` has a second purpose. It stays if the restoration of an existing
    store, or the repetition of a killed one, ends without a store. A start that finds the folder
    but no store refuses to create a new one.
    """
    from service.db.integrity import RESTORING

    folder = parent / (RESTORING + name)
    awaited = store is not None and (store.exists() or folder.exists())
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    clear(folder)
    try:
        yield folder
    finally:
        if store is None or not awaited or store.exists():
            shutil.rmtree(folder, ignore_errors=True)


def copy_files(folder: Path, manifest: "Manifest", folders: dict[str, Path]) -> None:
    """Copies the files of the manifest and checks their checksums."""
    for name, file in manifest.files.items():
        (folders[name] / name).touch(0o600)
        if summed(folder / name, folders[name] / name) != (file.bytes, file.sha256):
            raise CommandFailed(f"{folder / name} is not what the backup's manifest says")


def prepare(
    database: Path, key: Path, manifest: "Manifest", settings: "Settings", *, moved: bool
) -> "Restored":
    """Checks and migrates the copied database, and marks what may have happened since the backup.

    ConfigurationError: the database is damaged or newer, or its secrets have another key.
    """
    import asyncio

    from service.backends import open_store, secret_keys
    from service.db.snapshot import check_database, secrets
    from service.ops import logging
    from service.signing import Keyring
    from service.upkeep.restoring import Restoration, restore_stores

    logging.configure("console", "warning", sys.stderr)
    check_database(database, "the backup's database")
    keyring = Keyring(secret_keys(settings.model_copy(update={"data_dir": key})))
    uncertain_ms = round(settings.uncertain_after_s * 1000)
    give_up_ms = round(settings.submit_give_up_s * 1000)
    restoration = Restoration(milliseconds(manifest), uncertain_ms, give_up_ms, moved)
    copy = {"database_url": f"sqlite:///{database}", "migrate": "on"}

    async def prepared() -> "Restored":
        async with open_store(settings.model_copy(update=copy)) as store:
            for secret in await store.read(secrets):
                keyring.decrypt(secret)
            return await store.write(restore_stores, restoration)

    return asyncio.run(prepared())


def milliseconds(manifest: "Manifest") -> int:
    return round(manifest.made_at.timestamp() * 1000)


def copy_images(source: Path, target: Path, database: Path, lost: Sequence[str]) -> int:
    """Copies the images that the database names and checks their checksums. Returns their number.

    CommandFailed: an image is missing or damaged that was not `lost` at the backup.
    """
    from service.blobs.blob_store import check_name
    from service.db.snapshot import reading, stored_images

    count = 0
    with reading(database) as connection:
        for blob, size, sha256 in stored_images(connection):
            if blob in lost:
                continue
            name = check_name(blob)
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                intact = summed(source / name, target / name) == (size, sha256)
            except FileNotFoundError:
                intact = False
            if not intact:
                raise CommandFailed(f"the backup's image {name} is missing or damaged")
            count += 1
    return count


def set_aside(files: list[Path], time: str) -> list[str]:
    """Moves the files into folders beside them. A name with a dot in front is no image."""
    folders = set()
    for path in files:
        folder = path.parent / f".before-{time}"
        folder.mkdir(mode=0o700, exist_ok=True)
        path.rename(folder / path.name)
        folders.add(str(folder))
    return sorted(folders)
