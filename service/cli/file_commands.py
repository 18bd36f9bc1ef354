"""`darkroom files`: uploads input images, and lists, shows and erases them."""

from pathlib import Path
from typing import Annotated

import typer

from service.cli.api_client import ApiClient, api_client
from service.cli.output import Json, Text, option, put_result
from service.cli.place import say_place
from service.strict_json import JSON


def upload_files(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH", exists=True, dir_okay=False, readable=True)
    ],
    flatten: Annotated[
        bool, option("Put an image with an alpha channel on white.", "--flatten")
    ] = False,
    model: Annotated[
        Text, option("Check by the limits of this model in place of the common ones.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Upload input images. Prints the id of each."""
    client = api_client()
    for path in paths:
        file = upload(client, path, model, flatten=flatten)
        put_result(file, as_json, file["id"])
    say_place(client.at)


def upload(
    client: ApiClient, path: Path, model: str | None = None, *, flatten: bool = False
) -> JSON:
    """The stored file. CommandFailed names the path."""
    params = ({"flatten": "white"} if flatten else {}) | ({"model": model} if model else {})
    return client.upload("/v1/files", path, params=params)
