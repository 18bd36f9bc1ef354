"""`darkroom models`, `darkroom estimate` and `darkroom usage`."""

import json
from typing import Annotated, Any

import typer

from service.cli.api_client import api_client, segment
from service.cli.output import (
    Json,
    Text,
    Texts,
    option,
    plain,
    put,
    put_fields,
    put_json,
    put_table,
)
from service.cli.submit_options import put_all
from service.cli.verb import named
from service.strict_json import JSON, compact_json

COLUMNS = ("tasks", "images_requested", "images", "estimated", "reserved", "used", "refunded")
GROUPS = ("day", "model", "owner", "task")
SHOWN = ("model", "upstream", "edits", "source", "note", "example")


def models(
    name: Annotated[
        str | None, typer.Argument(help="Shows its fields, limits and sources.", metavar="NAME")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the catalogue: the models with their limits and prices."""
    path = "/v1/catalogue" if name is None else f"/v1/catalogue/{segment(name)}"
    document = api_client().call("GET", path)
    if as_json:
        put_json(document)
    elif name is None:
        put_table(
            [model_row(entry) for entry in document["data"]],
            *("model", "edits", "n", "input_images", "sizes", "price"),
        )
    else:
        shown = {each: document[each] for each in SHOWN}
        shown["example"] = compact_json(shown["example"])
        put_fields(shown | {"edits": yes(document["edits"]), "price": price(document["price"])})
        put("")
        rows = [field_row(field, rule) for field, rule in document["fields"].items()]
        put_table(rows, "field", "type", "default", "range", "source")


def model_row(entry: JSON) -> JSON:
    images, sizes = entry["input_images"] or {}, entry["sizes"] or {}
    most = images.get("max") or "any"
    return {
        "model": entry["model"],
        "edits": yes(entry["edits"]),
        "n": numbers(entry["fields"].get("n", {}).get("range", "")),
        "input_images": f"{images['min']} to {most}" if images else None,
        "sizes": ", ".join(sizes.get("forms", ())),
        "price": price(entry["price"]),
    }


def numbers(range: str) -> str:
    return range.partition(", together")[0].removeprefix("a whole number from ")


def field_row(field: str, rule: JSON) -> JSON:
    default = rule["default"]
    range = rule["range"] + (", required" if rule["required"] else "")
    return {
        "field": field,
        "type": rule["type"],
        "default": json.dumps(default) if isinstance(default, bool) else default,
        "range": range,
        "source": rule["source"],
    }


def yes(value: bool) -> str:
    return "yes" if value else "no"


def price(rule: JSON | None) -> str | None:
    """The price in words, with the prices of a field's values."""
    if rule is None:
        return None
    each = [f"{name} {credits}" for name, credits in (rule["values"] or {}).items()]
    more = f" ({rule['by']}: {', '.join(each)})" if each else ""
    return f"{rule['credits']} {rule['unit']} per {rule['per']}{more}"


def estimate(
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    prompt: Annotated[Text, option("What the images show.")] = None,
    size: Annotated[Text, option("Like 1280x1280 or 16:9.")] = None,
    n: Annotated[int | None, option("Number of images.", "--n", "-n", min=1)] = None,
    image: Annotated[Texts, option("An input image; may be repeated.", metavar="URL")] = None,
    field: Annotated[
        Texts, option("Any other field; may be repeated.", "--set", "--field", metavar="NAME=VALUE")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a submission will cost, without submitting it."""
    body: JSON = named({"prompt": prompt, "size": size, "n": n, "image_urls": image})
    put_all(body, field, "--set")
    cost = api_client().call("POST", "/v1/estimates", body=body | {"model": model})
    if as_json:
        put_json(cost)
    elif cost["credits"] is None:
        put(f"the catalogue has no price of {plain(model)}")
    else:
        put(f"{cost['credits']} {cost['unit']} = {cost['n']} x {cost['price']} per {cost['per']}")


def usage(
    by: Annotated[str, option("day, model, owner or task.", metavar="KEY")] = "day",
    since: Annotated[Text, option("From this day or time.", "--from", metavar="TIME")] = None,
    until: Annotated[Text, option("To this day or time.", "--to", metavar="TIME")] = None,
    owner: Annotated[Text, option("Admin: of this owner.", metavar="NAME")] = None,
    as_json: Json = False,
) -> None:
    """Show tasks, images and credits by day, model, owner or task."""
    if by not in GROUPS:
        raise typer.BadParameter(f"wants one of {', '.join(GROUPS)}", param_hint="--by")
    query: dict[str, Any] = named({"by": by, "from": since, "to": until, "owner": owner})
    report = api_client().call("GET", "/v1/usage", params=query)
    if as_json:
        put_json(report)
        return
    rows: list[JSON] = [row | {by: row["key"]} for row in report["data"]]
    put_table([*rows, report["totals"] | {by: "total"}], by, *COLUMNS)
