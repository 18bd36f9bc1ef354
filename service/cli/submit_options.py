"""Fields of a submission on the command line."""

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from service.cli.api_client import api_client, pairs
from service.cli.file_commands import upload
from service.cli.output import Text, Texts, option
from service.cli.sandbox_commands import json_or_text
from service.strict_json import JSON

Prompt = Annotated[
    str, typer.Argument(help="What the images show. - reads standard input.", metavar="PROMPT")
]
Model = Annotated[
    Text, option("Default: wan2.5-text-to-image, with --image wan2.5-image-to-image.")
]
NegativePrompt = Annotated[Text, option("What the images do not show.")]
PromptExtend = Annotated[
    bool | None,
    option("Whether the upstream extends the prompt.", "--prompt-extend/--no-prompt-extend"),
]
Fields = Annotated[
    Texts,
    option("Any other field, as JSON or text; may be repeated.", "--set", metavar="NAME=VALUE"),
]

Images = Annotated[
    Texts,
    option(
        "An input image, also a file or a stored image; may be repeated.",
        "--image",
        metavar="PATH|URL|img_…|file_…",
    ),
]


def key_of(text: str | None) -> str:
    """The idempotency key, a new one if none is given."""
    if text is None:
        return os.urandom(16).hex()
    if not re.fullmatch("[!-~]{1,255}", text):
        message = "wants 1 to 255 visible ASCII characters"
        raise typer.BadParameter(message, param_hint="--idempotency-key")
    return text


def prompt_of(text: str) -> str:
    """The prompt, or that of standard input for `-`."""
    if text != "-":
        return text
    try:
        read = sys.stdin.buffer.read().decode("utf-8").strip()
    except UnicodeDecodeError as error:
        message = f"standard input is not UTF-8: {error.reason} at byte {error.start}"
        raise typer.BadParameter(message, param_hint="PROMPT") from None
    if not read:
        raise typer.BadParameter("standard input has no prompt", param_hint="PROMPT")
    return read


def put_all(body: JSON, texts: list[str] | None, option: str) -> JSON:
    """The body with the fields of NAME=VALUE texts. A dotted name leads into an object."""
    for name, value in pairs(texts, option).items():
        *path, last = name.split(".")
        table: Any = body
        for part in path:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise typer.BadParameter(f"{name!r}: {part} is no object", param_hint=option)
        table[last] = json_or_text(value)
    return body


def inputs(images: list[str] | None, model: str) -> list[str] | None:
    """The entries of `image_urls`. Each path is uploaded first, within the limits of the model."""
    paths = [path_of(text) for text in images or []]
    if not any(paths):
        return images
    client = api_client()
    ids = {path: upload(client, path, model)["id"] for path in dict.fromkeys(paths) if path}
    return [ids[path] if path else text for path, text in zip(paths, images or [], strict=True)]


def path_of(text: str) -> Path | None:
    """The file that a text names, None for a link or an id."""
    if re.match(r"https?://|data:|(file|img)_[a-z2-7]{26}$", text):
        return None
    path = Path(text)
    if not path.is_file():
        raise typer.BadParameter(
            f"{text!r} is no file, no URL, and no id of an image", param_hint="--image"
        )
    return path
