"""The child process that decodes images. `service.images.validator` starts it.

The type counts by content. The header's pixels are checked before a frame is decoded, then every
frame is decoded. An image is kept byte for byte, with its metadata and any bytes behind its end.
It is served under a name made from its content, with `nosniff` and a sandboxing policy.

The kernel limits the child's memory, processor time, files and descriptors (decision 30).
"""

import ctypes
import hashlib
import json
import math
import os
import re
import resource
import signal
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import AvifImagePlugin, Image, UnidentifiedImageError

from service.content_coding import decompress
from service.images.validated_image import InvalidImage, MeasuredImage, ValidImage

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "AVIF")
INPUTS = (*FORMATS, "BMP", "TIFF")
WHITE = (255, 255, 255, 255)
FRAMES = 1000  # of an animation: each costs time, however small it is
GIF_BLOCKS = 500_000  # twice as many as a GIF of 50 MiB needs
CPU_S = 60  # the largest image takes some seconds of one core
END_OF_JPEG = b"\xff\xd9"
# After a scan: restart markers and stuffed bytes belong to it.
JPEG_SEGMENT = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")  # a fill byte is no marker
FRAME_HEADERS, SCAN_HEADER = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA), 0xDA
LOSSLESS = re.compile(rb"\xff[\xc3\xcb]")  # headers of frames that do not scale, in no scan
# Bytes that decode as different coefficients.
_noise = [hashlib.shake_128(seed).digest(64).replace(b"\xff", b"\x7f") for seed in (b"1", b"2")]
FILLERS = (bytes(64), *_noise)
# Address space: what the decoders need beside the image, and the most that a pixel needs.
BASE_BYTES, PIXEL_BYTES = 512 << 20, 24
NICE = 10
NO_NEW_PRIVILEGES = 38  # PR_SET_NO_NEW_PRIVS of prctl(2)


def main(max_bytes: int, max_pixels: int) -> None:
    # A supervisor may send SIGTERM to the whole group. The parent still needs the answer.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(NICE)
    with suppress(OSError):  # Linux: this process is the first to go when memory runs out
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    forgo_privileges()
    limit(resource.RLIMIT_AS, BASE_BYTES + PIXEL_BYTES * max_pixels + 3 * max_bytes, final=True)
    limit(resource.RLIMIT_FSIZE, max_bytes, final=True)
    limit(resource.RLIMIT_NOFILE, 64, final=True)
    limit(resource.RLIMIT_CORE, 0, final=True)
    for line in sys.stdin.buffer:
        limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + CPU_S)
        answer = validate_file(**json.loads(line), max_bytes=max_bytes, max_pixels=max_pixels)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def limit(kind: int, value: int, *, final: bool = False) -> None:
    """Sets the soft limit, at most to the hard one. `final`: the process cannot raise it again."""
    hard = resource.getrlimit(kind)[1]
    soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (soft, soft if final else hard))


def forgo_privileges() -> None:
    """Linux: no program that this process starts gets more rights, such as a setuid one."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)


def validate_file(
    path: str, *, compressed: bool, max_bytes: int, max_pixels: int, flatten: bool | None = None
) -> dict[str, Any]:
    """The child's answer. `flatten` None: a result, else an input image."""
    try:
        data = Path(path).read_bytes()
        if flatten is not None:
            return validate_input(path, data, max_pixels, flatten=flatten)
        if compressed and (plain := decompress(data, max_bytes)) is not None:
            if len(plain) > max_bytes:
                invalid = InvalidImage(f"over {max_bytes} bytes", final=True)
                return {"sha256": "", "bytes": 0, "invalid": asdict(invalid)}
            Path(path).write_bytes(plain)
            data = plain
    except OSError as error:
        return {"unavailable": error.strerror}
    return answer_about(data, check_image(data, max_pixels))


def answer_about(data: bytes, result: ValidImage | InvalidImage) -> dict[str, Any]:
    kind = "valid" if isinstance(result, ValidImage) else "invalid"
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), kind: asdict(result)}


def validate_input(path: str, data: bytes, max_pixels: int, *, flatten: bool) -> dict[str, Any]:
    """The child's answer about an input image. The file is written anew if it was flattened."""
    measured, result, content = check_input(data, max_pixels, flatten=flatten)
    if content is not data:
        Path(path).write_bytes(content)
    return answer_about(content, result) | {"measured": measured and asdict(measured)}


def check_input(
    data: bytes, max_pixels: int, *, flatten: bool
) -> tuple[MeasuredImage | None, ValidImage | InvalidImage, bytes]:
    """The figures of the header, what decoding found, and the bytes, which differ from the given
    ones if `flatten` removed an alpha channel. The parent knows the limits.
    """
    Image.MAX_IMAGE_PIXELS = None  # the header's pixels are checked before anything is decoded
    try:
        with warnings.catch_warnings(action="ignore"):
            opened = Image.open(BytesIO(data), formats=INPUTS)
    except MemoryError:
        raise  # the machine's fault
    except Exception:  # noqa: BLE001 - Pillow's plugins raise all kinds of errors on hostile bytes
        return None, InvalidImage("the file is no picture that can be read"), data
    with opened as image:
        format = format_of(image)
        (width, height), alpha = image.size, bool(image.has_transparency_data)
        measured = MeasuredImage(media_type(format), len(data), width, height, alpha)
        if width * height > max_pixels:
            reason = f"{width}x{height} has {width * height} pixels, and at most {max_pixels} are"
            return measured, InvalidImage(f"{reason} decoded"), data
        result = check_image(data, max_pixels, INPUTS)
        if isinstance(result, InvalidImage):
            return measured, InvalidImage(result.reason), data
        if alpha and flatten:
            data = flattened(image, format)
            measured = replace(measured, bytes=len(data), alpha=False)
        return measured, result, data


def flattened(image: Image.Image, format: str) -> bytes:
    """The image on white, in the same format. Its orientation and its colours stay."""
    on_white = Image.new("RGBA", image.size, WHITE)
    on_white.alpha_composite(image.convert("RGBA"))
    content = BytesIO()
    kept = {name: image.info[name] for name in ("exif", "icc_profile") if image.info.get(name)}
    if format == "WEBP":
        kept["lossless"] = True
    on_white.convert("RGB").save(content, format, **kept)
    return content.getvalue()


def check_image(
    data: bytes, max_pixels: int, formats: tuple[str, ...] = FORMATS
) -> ValidImage | InvalidImage:
    """Decodes every frame. The limit holds for the pixels of all frames together."""
    # Some decoders allocate memory for all pixels before a header can be looked at.
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings(action="ignore"):
            # Without this, Pillow refuses only images of twice as many pixels as allowed.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return decode(data, max_pixels, formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return InvalidImage(f"over {max_pixels} pixels", final=True)
    except UnidentifiedImageError:
        return InvalidImage("the bytes are no picture")
    except MemoryError:
        raise  # The machine's fault, not the image's: the child ends and the file is tried again.
    # Pillow's decoders raise all kinds of errors on hostile bytes (struct, Syntax, Overflow …).
    except Exception as error:  # noqa: BLE001
        return InvalidImage(f"the picture does not decode: {type(error).__name__}")


def decode(data: bytes, max_pixels: int, formats: tuple[str, ...]) -> ValidImage | InvalidImage:
    if data.startswith((b"GIF87a", b"GIF89a")) and (invalid := check_gif(data)):
        return invalid
    with Image.open(BytesIO(data), formats=formats) as image:
        (width, height), pixels = image.size, 0
        format = format_of(image)
        if not is_whole(format, data):
            if format == "JPEG" and lacks_only_its_end(data):
                return ValidImage(media_type(format), width, height)
            return InvalidImage("the picture is not whole")
        # GIF does not state its number of frames, and counting them would read all of them.
        frames = {"JPEG": 1, "GIF": FRAMES + 1}.get(format) or int(getattr(image, "n_frames", 1))
        if frames > FRAMES and format != "GIF":
            return InvalidImage(f"over {FRAMES} frames", final=True)
        for frame in range(frames):
            try:
                image.seek(frame)
            except EOFError:
                if format != "GIF":
                    raise
                break
            if frame == FRAMES:
                return InvalidImage(f"over {FRAMES} frames", final=True)
            pixels += image.width * image.height
            if pixels > max_pixels:
                size = f"{width}x{height}, up to frame {frame + 1},"
                return InvalidImage(f"{size} is over {max_pixels} pixels", final=True)
            if format == "JPEG" and not LOSSLESS.search(data):  # reads every bit, makes few pixels
                image.draft(None, (max(1, width // 8), max(1, height // 8)))
            image.load()
        return ValidImage(media_type(format), width, height)


def format_of(image: Image.Image) -> str:
    """A JPEG with further images behind it (a gain map) is one of Pillow's format MPO."""
    return "JPEG" if image.format == "MPO" else str(image.format)


def media_type(format: str) -> str:
    return f"image/{format.lower()}"


def is_whole(format: str, data: bytes) -> bool:
    """Whether the file has its format's end: Pillow decodes some images that are cut.

    A GIF's end is checked before. The decoder of AVIF needs every byte.
    """
    match format:
        case "PNG":
            return b"IEND\xae\x42\x60\x82" in data
        case "JPEG":
            return data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")  # an end behind the last scan
        case "WEBP":
            return len(data) >= 8 + int.from_bytes(data[4:8], "little")
    return True


def lacks_only_its_end(data: bytes) -> bool:
    """Whether a JPEG without its end marker decodes whole.

    The decoder reads the missing part of a scan, and the part after its next restart marker, from
    the bytes that follow. So the scans are whole if the pixels do not depend on these bytes.
    """
    if not has_all_scans(data):
        return False
    data, markers = data.rstrip(b"\xff"), [bytes((0xFF, 0xD0 + number)) for number in range(8)]
    last = max(markers, key=data.rfind)
    following = markers[(markers.index(last) + 1) % 8] if last in data else markers[0]
    pixels = set()
    for filler in FILLERS:
        completed = data + filler + following + filler + END_OF_JPEG
        with Image.open(BytesIO(completed), formats=("JPEG",)) as image:
            pixels.add(hashlib.sha256(image.tobytes()).digest())
    return len(pixels) == 1


def has_all_scans(data: bytes) -> bool:
    """Whether the scans of a JPEG cover the last bit of each coefficient of each component. A
    progressive file may be cut between two scans. An end marker on the way is the first image's, so
    the file is cut in a further one.
    """
    missing, at = {(-1, -1)}, 2
    while marker := JPEG_SEGMENT.search(data, at):
        if marker[1] == END_OF_JPEG[1:]:
            return False
        start = marker.end()
        at = start + int.from_bytes(data[start : start + 2], "big")
        body, kind = data[start + 2 : at], marker[1][0]
        if kind in FRAME_HEADERS:
            missing = {(component, place) for component in body[6::3] for place in range(64)}
        elif kind == SCAN_HEADER:
            components, (first, last, bits) = body[1:-3:2], body[-3:]
            if bits & 15 == 0:
                covered = range(first, last + 1)
                missing -= {(component, place) for component in components for place in covered}
    return not missing


def check_gif(data: bytes) -> InvalidImage | None:
    """Walks a GIF's blocks to its end. Pillow keeps every block of a comment in a list."""

    def palette(flags: int) -> int:
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0

    broken, blocks = InvalidImage("the picture is not whole"), 0
    try:
        at = 13 + palette(data[10])
        while (kind := data[at]) != 0x3B:  # the trailer
            if kind not in (0x21, 0x2C):
                return broken
            # An extension has a label. An image has its place, a palette and the size of its codes.
            at += 2 if kind == 0x21 else 11 + palette(data[at + 9])
            while size := data[at]:
                at += size + 1
                blocks += 1
                if blocks > GIF_BLOCKS:
                    return InvalidImage(f"over {GIF_BLOCKS} blocks", final=True)
            at += 1
    except IndexError:
        return broken
    return None
