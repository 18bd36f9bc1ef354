"""`darkroom backup`: the embedded store, its key and its images as a folder. `restore` puts it
back.

DIR/darkroom.db     the store at one moment
DIR/secret.key      unless DARKROOM_SECRET_KEY holds the key
DIR/images/…        what that store names, as hard links where the file system allows it: an image
never changes DIR/manifest.json   written last: a folder without it is no backup
"""

import hashlib
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service import VERSION
from service.cli.api_client import CommandFailed
from service.cli.output import Json, put_fields, put_json

if TYPE_CHECKING:
    from service.cli.manifest import Images, Manifest
    from service.settings import Settings

Folder = Annotated[Path, typer.Argument(metavar="DIR")]
DATABASE, KEY, IMAGES, MANIFEST = "darkroom.db", "secret.key", "images", "manifest.json"
PASSES = 5
CHUNK = 1 << 20


def embedded(settings: "Settings") -> Path:
    """The store's file; CommandFailed on PostgreSQL, ConfigurationError: it is a link."""
    from service.db.integrity import refuse_no_file

    if settings.sqlite_path is None:
        raise CommandFailed(
            "this command is for the embedded store; PostgreSQL is backed up by its own tools: see"
            " docs/backup.md"
        )
    refuse_no_file(settings.sqlite_path)
    return settings.sqlite_path


def summed(source: Path, target: Path | None = None) -> tuple[int, str]:
    """A file's length and sum; copied to `target` on the way."""
    sha256, size = hashlib.sha256(), 0
    with source.open("rb") as file, (target or Path(os.devnull)).open("wb") as copy:
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
            size += copy.write(chunk)
    return size, sha256.hexdigest()


# --- making one
# --------------------------------------------------------------------------------------------------


def backup(dir: Folder, as_json: Json = False) -> None:
    """Copy the embedded store into a new folder: database, key and images of one moment. The
    service may run meanwhile.
    """
    from service.settings import load_settings

    settings = load_settings()
    path = embedded(settings)
    if not path.exists():
        raise CommandFailed(f"there is no store at {path}")
    dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(dir.iterdir()):
        raise CommandFailed(f"{dir} is not empty: a backup wants a new folder")
    try:
        manifest = made(settings, path, dir)
    except BaseException:
        emptied(dir)
        raise
    shown = manifest.model_dump(mode="json")
    if as_json:
        put_json(shown)
    else:
        put_fields(
            {
                "backup": str(dir),
                **{name: shown[name] for name in ("made_at", "tasks", "events", "images")},
            }
        )
    if lost := manifest.images.lost:
        raise CommandFailed(
            f"the backup is made, but {len(lost)} images that the store names are not in"
            f" {settings.image_dir}: {lost[0]} …"
        )


def made(settings: "Settings", path: Path, folder: Path) -> "Manifest":
    from service.cli.direct_keys import is_unserved
    from service.cli.manifest import FORMAT, Images, Manifest, Sum
    from service.db.clock import wall_clock
    from service.db.snapshot import copy_database, figures, reading
    from service.ids import sequence_text

    served, now = (
        not is_unserved(settings),
        wall_clock(),
    )  # before the copy: whatever comes after it is younger
    key = settings.data_dir / KEY
    if not settings.secret_key:
        (folder / KEY).touch(0o600)
        summed(key, folder / KEY)
    if settings.blob_url.startswith("file:"):
        images = with_images(path, settings.image_dir, folder)
    else:
        copy_database(path, folder / DATABASE)
        images = Images(kept_at=settings.blob_url)
    with reading(folder / DATABASE) as connection:
        found = figures(connection)
    manifest = Manifest(
        format=FORMAT,
        darkroom=VERSION,
        made_at=datetime.fromtimestamp(now / 1000, UTC),
        served=served or not is_unserved(settings),
        schema_version=found.schema,
        tasks=found.tasks,
        events=found.events,
        sequence=sequence_text(found.sequence),
        files={
            name: Sum.of(*summed(folder / name))
            for name in (DATABASE, KEY)
            if (folder / name).exists()
        },
        images=images,
    )
    draft = folder / f".{MANIFEST}"
    draft.write_text(manifest.model_dump_json(indent=2) + "\n", "utf-8")
    os.sync()  # everything above, folders included, before the file that vouches for it
    draft.rename(folder / MANIFEST)
    os.sync()
    return manifest


def with_images(path: Path, source: Path, folder: Path) -> "Images":
    """Copies the database, then every image it names: each was durable before it was named.

    One that was erased in between sends us back to copy the database again. One that is missing
    twice is lost.
    """
    from service.cli.manifest import Images
    from service.db.snapshot import copy_database, reading, stored_images

    kept: dict[str, int] = {}
    missing: list[str] = []
    for _ in range(PASSES):
        copy_database(path, folder / DATABASE)
        before, missing, named = missing, [], set[str]()
        with reading(folder / DATABASE) as connection:
            for image in stored_images(connection):
                named.add(image.blob)
                if image.blob in kept:
                    continue
                if same(
                    source / image.blob, folder / IMAGES / image.blob, image.bytes, image.sha256
                ):
                    kept[image.blob] = image.bytes
                else:
                    missing.append(image.blob)
        for blob in kept.keys() - named:
            (folder / IMAGES / blob).unlink()
            del kept[blob]
        if missing == before or not missing:
            break
    return Images(count=len(kept), bytes=sum(kept.values()), lost=missing)


def same(source: Path, target: Path, size: int, sha256: str) -> bool:
    """Links or copies an image; False if there is none, or another one."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        if source.stat().st_size != size:
            return False
        try:
            os.link(source, target)
        except FileNotFoundError:
            raise
        except OSError:  # another file system, or one without links, or too many of them
            if summed(source, target) != (size, sha256):
                target.unlink()
                return False
    except FileNotFoundError:
        return False
    return True


def emptied(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
