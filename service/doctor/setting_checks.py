"""Checks of the settings' text and of the process's limits."""

import os
import resource
from collections.abc import Mapping
from pathlib import Path

from service.backends import DELIVERIES, REDELIVERIES
from service.doctor.patient import Finding, Patient, fault, ok
from service.errors import ConfigurationError, SettingsError
from service.settings import Settings, load_settings
from service.variables import ENV_FILE, PREFIX

QUOTES = "\"'"
# Deliveries and retries at once, as many sockets of clients, and what files and databases need.
FILES = 2 * (DELIVERIES + REDELIVERIES) + 256


def settings_that_work() -> tuple[Settings | None, dict[str, Finding]]:
    """The settings without the wrong ones, or None, and a fault for each of these."""
    found: dict[str, Finding] = {}
    left = dict(os.environ)
    env_file: Path | None = ENV_FILE
    while True:
        complaints: Mapping[str, str] = {}
        try:
            return load_settings(left, env_file), found or {"settings": ok("all settings are read")}
        except SettingsError as error:
            complaints = error.complaints
            for name, line in complaints.items():
                mend = f"correct {name}: docs/settings.md has its form"
                found[f"setting {name}"] = fault(line.replace("\n", " ")[:300], mend)
        except ConfigurationError as error:  # the file cannot be read
            found["settings"] = fault(str(error), f"correct {env_file}")
        wrong = {name for name in left if name.upper() in complaints}
        if not wrong:  # it is in the file
            if env_file is None:
                return None, found
            env_file = None
        for name in wrong:
            del left[name]


async def check_secrets(patient: Patient) -> dict[str, Finding]:
    """Keys in quotes, which another program's environment file has kept."""
    settings = patient.settings
    if isinstance(patient.keyring, str):
        mend = "put the key back, or for a new store set one of 32 bytes: openssl rand -hex 32"
        return {"secrets": fault(patient.keyring, mend)}
    keys = settings.secret_key.get_secret_value() if settings.secret_key else ""
    for part in keys.split(","):
        if (part := part.strip()) and (part[0] in QUOTES or part[-1] in QUOTES):
            text = "DARKROOM_SECRET_KEY has quotes around a key, and they belong to the key"
            mend = (
                "if another process reads the key without quotes, remove them everywhere: append"
                " the key without quotes, move it to the first place, drop the old one"
            )
            return {"secrets": fault(text, mend)}
    for name in ("evolink_api_key", "admin_key"):
        secret = getattr(settings, name)
        if secret and secret.get_secret_value()[0] in QUOTES:
            text = f"{PREFIX}{name.upper()} has quotes around it, and they belong to it"
            return {"secrets": fault(text, f"remove the quotes from {PREFIX}{name.upper()}")}
    return {"secrets": ok("the secrets are long enough and have no quotes")}


async def check_open_files(_: Patient) -> dict[str, Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= FILES:
        return {"open_files": ok(f"the process may open {soft} files")}
    text = f"the process may open {soft} files, and a busy one needs {FILES} (hard limit {hard})"
    mend = "raise the limit: LimitNOFILE=65536 of systemd, or ulimit -n 65536"
    return {"open_files": fault(text, mend)}
