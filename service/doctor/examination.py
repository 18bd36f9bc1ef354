"""An examination: all checks at once, each with a limit of time, and a document of the findings."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import asdict

import structlog

from service.doctor.broker_checks import check_brokers
from service.doctor.patient import Finding, Patient, fault
from service.doctor.setting_checks import check_files, check_secrets
from service.doctor.store_checks import (
    check_disk,
    check_endpoints,
    check_images,
    check_store,
    check_workers,
)
from service.doctor.upstream_checks import check_callbacks, check_upstream
from service.strict_json import JSON

log = structlog.get_logger()

LIMIT_S = 30.0
# Each check with what it finds, for the documentation.
CHECKS: Mapping[Callable[[Patient], Awaitable[dict[str, Finding]]], Mapping[str, str]] = {
    check_secrets: {"secrets": "a secret key is missing, too short, or in quotes"},
    check_files: {"open_files": "the limit of open files is too low"},
    check_store: {"store": "the database does not answer, does not commit, or has another schema"},
    check_disk: {"store_disk": "the embedded store is on a network file system"},
    check_images: {
        "images": "the image store takes no file, or is nearly full",
        "image_links": "`DARKROOM_IMAGE_BASE_URL` does not serve a new image, such as without a"
        " bucket policy",
    },
    check_workers: {"workers": "no process has workers"},
    check_upstream: {
        "upstream": "the base URL is wrong, redirects, or cannot be reached",
        "upstream_key": "the key is missing or refused",
        "upstream_credits": "no credits are left",
        "upstream_clock": "the clock differs from the upstream's `Date` by more than 30 s",
    },
    check_callbacks: {
        "callbacks": "the callback URL is not https, cannot be reached, redirects, or something"
        " else answers the signed probe"
    },
    check_brokers: {
        "broker NAME": "a broker cannot be used, or does not keep what it confirms",
        "broker_lag NAME": "a broker lacks events for more than a minute",
    },
    check_endpoints: {
        "endpoints": "an endpoint redirects",
        "result_hosts": "results wait whose host is not allowed",
    },
}


# The settings of a check. It is skipped if one of them cannot be read. With the default in its
# place the check would examine something else, and send a key to it.
NETWORKS, DATA = "DARKROOM_UPSTREAM_NETWORKS", "DARKROOM_DATA_DIR"
NEEDS: Mapping[object, tuple[str, ...]] = {
    check_secrets: ("DARKROOM_SECRET_KEY",),
    check_upstream: ("DARKROOM_EVOLINK_BASE_URL", "DARKROOM_EVOLINK_API_KEY", NETWORKS),
    check_callbacks: ("DARKROOM_CALLBACK_URL", "DARKROOM_SECRET_KEY", NETWORKS),
    check_store: ("DARKROOM_DATABASE_URL", DATA),
    check_disk: ("DARKROOM_DATABASE_URL", DATA),
    check_images: ("DARKROOM_BLOB_URL", "DARKROOM_IMAGE_BASE_URL", DATA),
}


async def examine(patient: Patient, wrong: Collection[str] = ()) -> dict[str, Finding]:
    """The findings by name, in the order of the checks. `wrong`: settings that cannot be read."""
    checks = [check for check in CHECKS if not set(wrong) & set(NEEDS.get(check, ()))]
    results = await asyncio.gather(*(_run(check, patient) for check in checks))
    return {name: finding for found in results for name, finding in found.items()}


async def _run(
    check: Callable[[Patient], Awaitable[dict[str, Finding]]], patient: Patient
) -> dict[str, Finding]:
    name = next(iter(CHECKS[check]))
    try:
        async with asyncio.timeout(LIMIT_S):
            return await check(patient)
    except Exception as error:  # noqa: BLE001 - one check must not hide the findings of the others
        reason = "no answer in time" if isinstance(error, TimeoutError) else repr(error)[:200]
        return {name: fault(f"the check failed: {reason}", "look at the log and at docs/doctor.md")}


def report(findings: Mapping[str, Finding]) -> JSON:
    states = {finding.state for finding in findings.values()}
    checks = [{"name": name, **asdict(finding)} for name, finding in findings.items()]
    status = "fault" if "fault" in states else "warning" if "warning" in states else "ok"
    return {"status": status, "checks": checks}
