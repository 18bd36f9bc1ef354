"""Which service or store a client command works on, and the line that says so."""

import inspect
import re
import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Any, get_args

import typer
from typer.models import OptionInfo

from service.cli.output import Text, option
from service.variables import ENV_FILE, PREFIX, is_setting, tidy, variables_of

DEFAULT_URL = "http://127.0.0.1:8080"
SIMPLE_URL = re.compile(r"https?://[a-z0-9.-]+(:[0-9]{1,5})?/?")
SIMPLE_KEY = re.compile(r"[!-~]+")
LOCAL = "--local"
KEYWORD = inspect.Parameter.KEYWORD_ONLY
EVERYWHERE = ("0.0.0.0", "::", "localhost")  # noqa: S104 - compared, not listened on
Url = Annotated[Text, option("The service, in place of DARKROOM_URL.", "--url", metavar="URL")]
Local = Annotated[
    bool, option("The service or store of the settings here, in place of DARKROOM_URL.", LOCAL)
]


@dataclass(frozen=True, slots=True)
class Choice:
    url: str | None = None
    local: bool = False


CHOSEN: ContextVar[Choice] = ContextVar("choice", default=Choice())  # noqa: B039 - frozen


def choose(url: str | None, local: bool) -> None:
    """Options after the command win over those before it."""
    if url and local:
        raise typer.BadParameter(f"goes without {LOCAL}", param_hint="--url")
    if url or local:
        CHOSEN.set(Choice(url, local))


def selectable(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options `--url` and `--local`. If the command has a `--url` of its own,
    the program takes the other one before the command's name.
    """
    own = inspect.signature(command).parameters
    has_url = "url" in own and any(
        isinstance(each, OptionInfo) for each in get_args(own["url"].annotation)
    )
    more = [inspect.Parameter("at_local", KEYWORD, annotation=Local, default=False)]
    if not has_url:
        more.insert(0, inspect.Parameter("at_url", KEYWORD, annotation=Url, default=None))

    def run(**given: Any) -> None:
        choose(given.pop("at_url", None), given.pop("at_local"))
        command(**given)

    run.__name__ = command.__name__
    parameters = [*(each.replace(kind=KEYWORD) for each in own.values()), *more]
    return signed(run, parameters, command.__doc__)


def signed(
    command: Callable[..., None], parameters: list[inspect.Parameter], help: str | None
) -> Callable[..., None]:
    """The command with the parameters and the help that typer shows."""
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__doc__ = help
    return command


@dataclass(frozen=True, slots=True)
class Place:
    """The address of a service with the option or variable that named it, and the keys for it."""

    url: str
    named_by: str | None
    api_key: str | None
    admin_key: str | None

    def __str__(self) -> str:
        return f"{self.url} ({self.named_by})" if self.named_by else self.url


def place() -> Place:
    """Where the command goes. Values that are not plain are read, and refused, by the settings."""
    import os

    choice, values, sources = CHOSEN.get(), {}, {}
    for source, variables in (("in .env", variables_of(ENV_FILE)), ("", os.environ)):
        for name, value in variables.items():
            if value and is_setting(name, value) and (text := tidy(name, value)):
                values[name.removeprefix(PREFIX)], sources[name.removeprefix(PREFIX)] = text, source
    if choice.local:
        values.pop("URL", None)
    url, named_by = values.get("URL", DEFAULT_URL), None
    if choice.url:
        url, named_by = choice.url, "--url"
    elif choice.local:
        url = reached_at(values.get("HOST", "127.0.0.1"), values.get("PORT", "8080"))
        named_by = LOCAL
    elif "URL" in values:
        named_by = f"{PREFIX}URL {sources['URL']}".strip()
    keys = [values.get("API_KEY"), values.get("ADMIN_KEY")]
    if not SIMPLE_URL.fullmatch(url) or not all(SIMPLE_KEY.fullmatch(key or "-") for key in keys):
        from service.settings import load_settings

        url = load_settings(url=url).url
    return Place(url.rstrip("/"), named_by, *keys)


def http_address(host: str, port: int | str) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def reached_at(host: str, port: int | str) -> str:
    """Where this machine reaches a service that listens on the host."""
    return http_address("127.0.0.1" if host in EVERYWHERE else host, port)


def say_place(where: object) -> None:
    """Says on standard error where the command did its work."""
    sys.stderr.write(f"at {where}\n")
