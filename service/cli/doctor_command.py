"""`darkroom doctor`: checks of the set-up, by the service or by this program."""

import sys
from typing import TYPE_CHECKING, Annotated

from service.cli.api_client import CommandFailed, ServiceUnreachable, api_client
from service.cli.output import Json, option, plain, put, put_json
from service.errors import ConfigurationError
from service.strict_json import JSON

if TYPE_CHECKING:
    from service.doctor.patient import Finding

MARKS = {"ok": "ok     ", "warning": "warning", "fault": "FAULT  ", "skipped": "-      "}


def doctor(
    local: Annotated[
        bool, option("Check from here, also if the service does not start.", "--local")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check the set-up, and say how to mend what is wrong. Exits with 1 if there is a fault."""
    report = examined_here() if local else asked()
    if as_json:
        put_json(report)
    else:
        for check in report["checks"]:
            mend = f" → {check['mend']}" if check["mend"] else ""
            put(f"{MARKS[check['state']]}  {check['name']}: {plain(check['finding'] + mend)}")
    if report["status"] == "fault":
        faults = [check["name"] for check in report["checks"] if check["state"] == "fault"]
        number = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise CommandFailed(f"{number}: {', '.join(faults)}")


def asked() -> JSON:
    try:
        return api_client().call("GET", "/v1/doctor")
    except (ServiceUnreachable, ConfigurationError) as error:
        message = f"{error}; `darkroom doctor --local` checks without the service"
        raise CommandFailed(message) from None


def examined_here() -> JSON:
    import asyncio

    from service.doctor.examination import examine, report
    from service.doctor.patient import local
    from service.doctor.setting_checks import settings_that_work
    from service.ops import logging

    logging.configure("console", "critical", sys.stderr)
    settings, checks = settings_that_work()

    async def findings() -> "dict[str, Finding]":
        if settings is None:
            return {}
        async with local(settings) as patient:
            return await examine(patient, [name.removeprefix("setting ") for name in checks])

    return report(checks | asyncio.run(findings()))
