"""Checks of the settings' text and of the process's limits."""

import os
import re
import resource
from collections.abc import Mapping
from pathlib import Path

from service.backends import DELIVERIES, REDELIVERIES
from service.doctor.patient import Finding, Patient, fault, ok
from service.errors import ConfigurationError
from service.settings import Settings, load_settings

QUOTES = "\"'"
# Deliveries and retries at once, as many sockets of clients, and what files and databases need.
FILES = 2 * (DELIVERIES + REDELIVERIES) + 256
NAMED = re.compile(r"DARKROOM_[A-Z0-9_]+")


def settings_that_work(
    environ: Mapping[str, str] = os.environ, env_file: Path | None = Path(".env")
) -> tuple[Settings | None, dict[str, Finding]]:
    """The settings without the wrong ones, and a fault for each of these. None: even the rest
    cannot be read.
    """
    found: dict[str, Finding] = {}
    left = dict(environ)
    while True:
        try:
            return load_settings(left, env_file), found or {"settings": ok("all settings are read")}
        except ConfigurationError as error:
            wrong: set[str] = set()
            for complaint in str(error).split("; DARKROOM_"):
                text = complaint if complaint.startswith("DARKROOM_") else f"DARKROOM_{complaint}"
                name = NAMED.match(text)
                key = f"setting {name[0]}" if name else "settings"
                mend = f"correct {name[0] if name else env_file}: docs/settings.md has its form"
                found[key] = fault(mended(str(error) if not name else text), mend)
                wrong |= {each for each in left if name and each.upper() == name[0]}
            if not wrong:  # it is in the file
                if env_file is None:
                    return None, found
                env_file = None
            for each in wrong:
                del left[each]


def mended(text: str) -> str:
    return text.replace("\n", " ")[:300]


async def check_secrets(patient: Patient) -> dict[str, Finding]:
    """Keys in quotes, which another program's environment file has kept."""
    settings = patient.settings
    if isinstance(patient.keyring, str):
        mend = "set DARKROOM_SECRET_KEY to 32 bytes or more: openssl rand -base64 48"
        return {"secrets": fault(patient.keyring, mend)}
    given = settings.secret_key.get_secret_value() if settings.secret_key else ""
    for part in given.split(","):
        if (part := part.strip()) and (part[0] in QUOTES or part[-1] in QUOTES):
            said = "DARKROOM_SECRET_KEY has quotes around a key, and they belong to the key"
            mend = (
                "if another process reads the key without quotes, remove them everywhere: append"
                " the key without quotes, move it to the first place, drop the old one"
            )
            return {"secrets": fault(said, mend)}
    return {"secrets": ok("the secrets are long enough and have no quotes")}


async def check_files(_: Patient) -> dict[str, Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= FILES:
        return {"open_files": ok(f"the process may open {soft} files")}
    said = f"the process may open {soft} files, and a busy one needs {FILES} (hard limit {hard})"
    mend = "raise the limit: LimitNOFILE=65536 of systemd, or ulimit -n 65536"
    return {"open_files": fault(said, mend)}
