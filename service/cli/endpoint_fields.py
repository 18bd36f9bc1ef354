"""The fields of an endpoint on the command line."""

import typer

from service.cli.api_client import pairs
from service.cli.verb import named
from service.strict_json import JSON


def with_owner(given: JSON) -> JSON:
    """An owner of `*` is null: the endpoint gets the events of every owner."""
    return options(given) | ({"owner": None} if given["owner"] == "*" else {})


def options(given: JSON) -> JSON:
    """The options as the API has them. An empty text clears one. --ordered-by means --ordered."""
    given = named(given)
    if given.get("ordered_by"):
        given.setdefault("ordered", True)
    for name in {"metadata", "header"} & given.keys():
        given[name] = {} if given[name] == [""] else pairs(given[name], f"--{name}")
    for name in {"ordered_by", "rate_per_s"} & given.keys():
        given[name] = given[name] or None
    if given.get("rate_per_s"):
        given["rate_per_s"] = number(given["rate_per_s"], "--rate-per-s")
    return {"headers" if name == "header" else name: value for name, value in given.items()}


def number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number", param_hint=option) from None


def some_change(given: JSON) -> JSON:
    if not (changes := options(given)):
        raise typer.BadParameter("name something to change, such as --url, --type or --status")
    return changes
