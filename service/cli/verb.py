"""The form of a client command that sends one request."""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, get_args

import typer

from service.cli import direct_keys
from service.cli.api_client import ApiClient, CommandFailed, api_client, segment
from service.cli.output import Json, put_fields, put_table, remark, show
from service.cli.place import KEYWORD, say_place, signed
from service.strict_json import JSON

DEFAULTS = {"limit": 100, "only": "undelivered", "dry_run": False, "yes": False}


def named(given: JSON) -> JSON:
    """The fields that the command line names."""
    return {name: value for name, value in given.items() if value not in (None, [])}


@dataclass(frozen=True, slots=True)
class Verb:
    """One command.

    Names in the path are arguments, and fill it. `fields` arranges the others as the query of a
    GET, or as the JSON body of any other method. A response with a list in `listed` shows the
    `columns` of each `row`, and fields beside it. `people` arranges any other response for people.
    An empty response shows the id and `done`. A response with an error fails the command with the
    words of `failed`. `directly` does the same in the store itself when no process serves it.
    """

    help: str
    request: str
    takes: Mapping[str, Any] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    fields: Callable[[JSON], JSON] = named
    listed: str = "data"
    row: Callable[[JSON], JSON] = dict
    people: Callable[[JSON], JSON] = dict
    done: str | None = None
    failed: str | None = None
    directly: direct_keys.Action | None = None

    def command(self) -> Callable[..., None]:
        """The function from which typer takes the parameters and the help."""

        def run(as_json: bool, **given: Any) -> None:
            self.run(given, as_json)

        ids = {name: Annotated[str, typer.Argument(metavar=name.upper())] for name in self.ids}
        parameters = [
            inspect.Parameter(name, KEYWORD, annotation=kind, default=default(name, kind))
            for name, kind in {**ids, **self.takes}.items()
        ]
        parameters.append(inspect.Parameter("as_json", KEYWORD, annotation=Json, default=False))
        return signed(run, parameters, self.help)

    @property
    def ids(self) -> list[str]:
        return re.findall(r"{(\w+)}", self.request)

    def run(self, given: JSON, as_json: bool) -> None:
        ids = {name: given.pop(name) for name in self.ids}
        fields = self.fields(given)
        send = partial(self.send, ids=ids, fields=fields if given or fields else None)
        if self.directly is not None:
            document, at = direct_keys.administer(send, self.directly, ids | fields)
        else:
            client = api_client()
            document, at = send(client), client.at
        if self.done is not None:
            document = {**ids, self.done: True}
        self.show(document, as_json)
        if self.failed is not None and document["error"] is not None:
            raise CommandFailed(f"{self.failed}: {document['error']}")
        if not self.request.startswith("GET ") or self.directly is not None:
            say_place(at)

    def send(self, client: ApiClient, *, ids: JSON, fields: JSON | None) -> JSON:
        method, path = self.request.split()
        path = path.format_map({name: segment(value) for name, value in ids.items()})
        if method == "GET":
            return client.call(method, path, params=fields)
        return client.call(method, path, body=fields)

    def show(self, document: JSON, as_json: bool) -> None:
        if as_json or not self.columns:
            show(document if as_json else self.people(document), as_json)
            return
        if self.listed != "data":
            put_fields({name: value for name, value in document.items() if name != self.listed})
        put_table([self.row(each) for each in document[self.listed]], *self.columns)
        if document.get("next_cursor"):
            remark(f"more: --cursor {document['next_cursor']}")


def default(name: str, kind: Any) -> Any:
    """A parameter's default. A text that may not be None has none."""
    required = get_args(kind)[0] is str and name not in DEFAULTS
    return inspect.Parameter.empty if required else DEFAULTS.get(name)
