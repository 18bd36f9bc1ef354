"""`darkroom backup`: the embedded store, its key and its images in a folder.

DIR/darkroom.db    the store of one moment
DIR/secret.key     unless the key is in DARKROOM_SECRET_KEY
DIR/images/…       the images that this store names, as hard links where the file system has them
DIR/manifest.json  written last: a folder without it is no backup
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
    """The file of the embedded store. CommandFailed on PostgreSQL."""
    from service.db.integrity import refuse_no_file

    if settings.sqlite_path is None:
        raise CommandFailed(
            "this command is for the embedded store; PostgreSQL is backed up by its own tools: see"
            " docs/backup.md"
        )
    refuse_no_file(settings.sqlite_path)
    return settings.sqlite_path


def summed(source: Path, target: Path | None = None) -> tuple[int, str]:
    """The length and the SHA-256 of a file, which is copied to `target`."""
    sha256, size = hashlib.sha256(), 0
    with source.open("rb") as file, (target or Path(os.devnull)).open("wb") as copy:
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
            size += copy.write(chunk)
    return size, sha256.hexdigest()


def clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def backup(dir: Folder, as_json: Json = False) -> None:
    """Copy the embedded store of one moment into a new folder: database, key and images. The
    service may run meanwhile.
    """
    from service.folders import keep_private
    from service.settings import load_settings

    keep_private()
    settings = load_settings()
    path = embedded(settings)
    if not path.exists():
        raise CommandFailed(f"there is no store at {path}")
    dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(dir.iterdir()):
        raise CommandFailed(f"{dir} is not empty: a backup wants a new folder")
    try:
        manifest = write_backup(settings, path, dir)
    except BaseException:
        clear(dir)
        raise
    document = manifest.model_dump(mode="json")
    if as_json:
        put_json(document)
    else:
        fields = {name: document[name] for name in ("made_at", "tasks", "events", "images")}
        put_fields({"backup": str(dir)} | fields)
    if lost := manifest.images.lost:
        raise CommandFailed(
            f"the backup is made, but {len(lost)} images that the store names are not in"
            f" {settings.image_dir}: {lost[0]} …"
        )


def write_backup(settings: "Settings", path: Path, folder: Path) -> "Manifest":
    """Copies the key, the database and the images, and vouches for them with the manifest."""
    from service.cli.direct_keys import is_unserved
    from service.cli.manifest import FORMAT, Images, Manifest, Sum
    from service.db.clock import wall_clock
    from service.db.snapshot import copy_database, figures, reading

    # Read before the copy, so that all that the copy lacks is younger.
    served, now = not is_unserved(settings), wall_clock()
    if not settings.secret_key:
        (folder / KEY).touch(0o600)
        summed(settings.key_file, folder / KEY)
    if settings.blob_url.startswith("file:"):
        images = copy_with_images(path, settings.image_dir, folder)
    else:
        copy_database(path, folder / DATABASE)
        images = Images(kept_at=settings.blob_url)
    files = [name for name in (DATABASE, KEY) if (folder / name).exists()]
    sums = {name: summed(folder / name) for name in files}
    with reading(folder / DATABASE) as connection:
        manifest = Manifest(
            format=FORMAT,
            darkroom=VERSION,
            made_at=datetime.fromtimestamp(now / 1000, UTC),
            served=served or not is_unserved(settings),
            files={name: Sum(bytes=size, sha256=sha) for name, (size, sha) in sums.items()},
            images=images,
            **figures(connection),
        )
    draft = folder / f".{MANIFEST}"
    draft.write_text(manifest.model_dump_json(indent=2) + "\n", "utf-8")
    os.sync()  # everything that the manifest vouches for, folders included
    draft.rename(folder / MANIFEST)
    os.sync()
    return manifest


def copy_with_images(path: Path, source: Path, folder: Path) -> "Images":
    """Copies the database, then every image that it names.

    An image is durable before the database names it. So an image is missing because it was erased
    after the copy, or because the store has lost it. The database is copied again until no image is
    missing, or the same images are missing twice.
    """
    from service.cli.manifest import Images
    from service.db.snapshot import copy_database, reading, stored_images

    kept: dict[str, int] = {}
    missing: list[str] = []
    for _ in range(PASSES):
        copy_database(path, folder / DATABASE)
        before, missing, named = missing, [], set[str]()
        with reading(folder / DATABASE) as connection:
            for blob, size, sha256 in stored_images(connection):
                named.add(blob)
                if blob in kept:
                    continue
                if copy_image(source / blob, folder / IMAGES / blob, size, sha256):
                    kept[blob] = size
                else:
                    missing.append(blob)
        for blob in kept.keys() - named:
            (folder / IMAGES / blob).unlink()
            del kept[blob]
        if missing == before or not missing:
            break
    return Images(count=len(kept), bytes=sum(kept.values()), lost=missing)


def copy_image(source: Path, target: Path, size: int, sha256: str) -> bool:
    """Links or copies an image. False if it is missing or another one."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        if source.stat().st_size != size:
            return False
        try:
            os.link(source, target)
        except FileNotFoundError:
            raise
        except OSError:  # another file system, or a limit of links
            if summed(source, target) != (size, sha256):
                target.unlink()
                return False
    except FileNotFoundError:
        return False
    return True
