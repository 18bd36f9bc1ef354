"""The variables of the environment and of `.env`, before anything checks their values.

Client commands read three of them by this module alone, because it imports no library.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from service.errors import ConfigurationError

PREFIX = "DARKROOM_"
ENV_FILE = Path(".env")

# A cluster sets these variables for a Service called "darkroom" or "darkroom-…".
SERVICE_LINK_NAME = re.compile(
    r"DARKROOM_(\w+_)?"
    r"(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
NAME = re.compile(rf"(?<![\w/$.-]){PREFIX}\w+", re.ASCII | re.IGNORECASE)
SERVICE_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://")


def variables_of(env_file: Path | None) -> Mapping[str, str | None]:
    """The variables of the file. A missing file has none."""
    if env_file is None or not env_file.is_file():
        return {}
    from dotenv import dotenv_values
    from dotenv.parser import parse_stream

    try:
        with env_file.open(encoding="utf-8") as lines:
            broken = [each.original for each in parse_stream(lines) if each.error]
        for each in broken:
            if name := NAME.search(each.string):
                number = each.line + each.string[: name.start()].count("\n")
                line = f"{env_file}, line {number}: {name[0]} cannot be read"
                raise ConfigurationError(f"{line}: write {name[0]}=… with both quotes or none")
        return dotenv_values(env_file, encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"{env_file} cannot be read: {type(error).__name__}") from None


def is_setting(name: str, value: str | None) -> bool:
    """Whether a variable has the prefix, in any case, and is not set by a cluster or a test run."""
    link = SERVICE_LINK_NAME.fullmatch(name) or (
        name.endswith("PORT") and SERVICE_LINK_VALUE.match(value or "")
    )
    return name.upper().startswith(PREFIX) and not name.startswith(PREFIX + "TEST_") and not link


def tidy(name: str, value: str) -> str:
    """The value without blanks around it, and without the quotes that `docker run --env-file` and
    Kubernetes secrets keep. A secret key keeps its quotes, because signatures depend on them.
    """
    value = value.strip()
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
    return value[1:-1].strip() if quoted and name != f"{PREFIX}SECRET_KEY" else value
