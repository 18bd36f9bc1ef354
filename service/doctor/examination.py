"""An examination: all checks at once, each with a limit of time, and a document of the findings."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import asdict

from service.doctor.broker_checks import check_brokers
from service.doctor.patient import Finding, Patient, fault
from service.doctor.setting_checks import check_open_files, check_secrets
from service.doctor.store_checks import (
    check_endpoints,
    check_images,
    check_store,
    check_store_disk,
    check_workers,
)
from service.doctor.upstream_checks import check_callbacks, check_upstream
from service.strict_json import JSON

LIMIT_S = 30.0
Check = Callable[[Patient], Awaitable[dict[str, Finding]]]
NETWORKS, DATA = "DARKROOM_UPSTREAM_NETWORKS", "DARKROOM_DATA_DIR"
# Each check with its settings. It is skipped if one of them cannot be read. With the default in its
# place the check would examine something else, and send a key to it.
CHECKS: Mapping[Check, tuple[str, ...]] = {
    check_secrets: ("DARKROOM_SECRET_KEY",),
    check_open_files: (),
    check_store: ("DARKROOM_DATABASE_URL", DATA),
    check_store_disk: ("DARKROOM_DATABASE_URL", DATA),
    check_images: ("DARKROOM_BLOB_URL", "DARKROOM_IMAGE_BASE_URL", DATA),
    check_workers: (),
    check_upstream: ("DARKROOM_EVOLINK_BASE_URL", "DARKROOM_EVOLINK_API_KEY", NETWORKS),
    check_callbacks: ("DARKROOM_CALLBACK_URL", "DARKROOM_SECRET_KEY", NETWORKS),
    check_brokers: (),
    check_endpoints: (),
}


async def examine(patient: Patient, wrong: Collection[str] = ()) -> dict[str, Finding]:
    """The findings by name, in the order of the checks. `wrong`: settings that cannot be read."""
    checks = [check for check, settings in CHECKS.items() if not set(wrong) & set(settings)]
    results = await asyncio.gather(*(_run(check, patient) for check in checks))
    return {name: finding for findings in results for name, finding in findings.items()}


async def _run(check: Check, patient: Patient) -> dict[str, Finding]:
    try:
        async with asyncio.timeout(LIMIT_S):
            return await check(patient)
    except Exception as error:  # noqa: BLE001 - a check must not hide other findings
        reason = "no answer in time" if isinstance(error, TimeoutError) else repr(error)[:200]
        finding = fault(f"the check failed: {reason}", "look at the log and at docs/doctor.md")
        return {check.__name__.removeprefix("check_"): finding}


def report(findings: Mapping[str, Finding]) -> JSON:
    states = {finding.state for finding in findings.values()}
    checks = [{"name": name, **asdict(finding)} for name, finding in findings.items()]
    status = "fault" if "fault" in states else "warning" if "warning" in states else "ok"
    return {"status": status, "checks": checks}
