"""Checks of the way to the upstream and back."""

import os
from email.utils import parsedate_to_datetime
from time import time

from service.db.clock import wall_clock
from service.doctor.patient import PROBE_S, Finding, Patient, fault, ok, skipped, warning
from service.errors import EgressError
from service.ids import make_id
from service.net.responses import Response
from service.strict_json import read_object
from service.tasks.account_breaker import CREDITS, is_document, remaining_credits
from service.upstreams.lenient import document_of, section_of

KEY, ADDRESS = "DARKROOM_EVOLINK_API_KEY", "DARKROOM_EVOLINK_BASE_URL"
CALLBACKS = "DARKROOM_CALLBACK_URL"
SKEW_S = 30.0  # beyond it, receivers refuse signed deliveries and times of callbacks mislead


async def check_upstream(patient: Patient) -> dict[str, Finding]:
    """One free call, `GET /v1/credits`, shows the address, the key, the credits and the clock."""
    if patient.settings.evolink_api_key is None:
        if not patient.calls:
            return {"upstream_key": skipped("a process without workers needs no key")}
        missing = fault("the upstream's key is not set", f"set {KEY}")
        return {"upstream_key": missing, "upstream": skipped("asked only with a key")}
    started = time()
    try:
        answer = await patient.upstream.passthrough("GET", CREDITS)
    except EgressError as error:
        mend = f"mend {ADDRESS}, DNS or the firewall"
        return {"upstream": fault(f"the upstream cannot be reached: {error}", mend)}
    clock = {"upstream_clock": skew(answer, (started + time()) / 2)}
    code = section_of(document_of(answer.body), "error").get("code")
    if answer.status == 402:
        return {"upstream": ok(CALL), "upstream_key": ok(TAKEN), "upstream_credits": EMPTY, **clock}
    if answer.status in (401, 403) and document_of(answer.body) is not None:
        text = f"the upstream refuses the key: {answer.status} {code or ''}".strip()
        refused = fault(text, f"put the account's key in {KEY}, and restart")
        return {"upstream": ok(CALL), "upstream_key": refused, **clock}
    if not is_document(answer):
        return {"upstream": not_the_api(answer)}
    return {
        "upstream": ok(CALL),
        "upstream_key": ok(TAKEN),
        "upstream_credits": credits_left(answer.body),
        **clock,
    }


CALL, TAKEN = "the free call for the credits succeeded", "the upstream takes the key"
EMPTY = fault("the account has no credits", "buy credits at the upstream")


def not_the_api(answer: Response) -> Finding:
    if 300 <= answer.status < 400:
        to = answer.headers.get("location", "nowhere")
        mend = f"set {ADDRESS} to the upstream's API itself, which does not redirect"
        return fault(f"the upstream's address redirects to {to[:200]}", mend)
    if answer.status >= 500 or answer.status == 429:
        text = f"the upstream answers {answer.status} for now"
        return warning(text, "wait, and look at the upstream's status page")
    text = f"what answers {answer.status} is not the upstream's API"
    return fault(text, f"set {ADDRESS} to the upstream's API, such as https://api.evolink.ai")


def credits_left(body: bytes) -> Finding:
    left = remaining_credits(body)
    if left is None:
        return skipped("the upstream does not say how many credits are left")
    return EMPTY if left <= 0 else ok(f"{left:g} credits are left")


def skew(answer: Response, now: float) -> Finding:
    """The clock against the upstream's `Date`, which has whole seconds."""
    try:
        away = now - parsedate_to_datetime(answer.headers["date"]).timestamp()
    except (KeyError, ValueError):
        return skipped("the upstream's answer has no Date")
    if abs(away) <= SKEW_S:
        return ok(f"the clock is within {SKEW_S:g} s of the upstream's")
    which = "ahead of" if away > 0 else "behind"
    text = f"the clock is {abs(away):.0f} s {which} the upstream's"
    return fault(text, "set the clock by NTP: timedatectl set-ntp true")


async def check_callbacks(patient: Patient) -> dict[str, Finding]:
    """The service sends itself a signed callback about no task through the public address. The
    route answers it with 200 `accepted`. The worker's verdict on it is `unknown`.
    """
    url, keyring = patient.settings.callback_url, patient.keyring
    if url is None:
        return {"callbacks": ok("no callback URL is set: tasks are settled by queries")}
    if keyring is None or isinstance(keyring, str):
        return {"callbacks": skipped("without a secret key no callback can be signed")}
    task_id = make_id("task", wall_clock(), os.urandom(10))
    name = patient.upstream.name
    path = f"/callbacks/{name}/{task_id}/{keyring.callback_token(name, task_id)}"
    headers = {"content-type": "application/json"}
    try:
        answer = await patient.egress.request(
            "POST", url + path, headers=headers, content=b"{}", timeout=PROBE_S
        )
    except EgressError as error:
        mend = f"let {CALLBACKS} lead to this service from the internet: DNS, firewall, proxy"
        return {"callbacks": fault(f"{url} cannot be reached: {error}", mend)}
    return {"callbacks": answered(url, answer)}


def answered(url: str, answer: Response) -> Finding:
    if 300 <= answer.status < 400:
        to = answer.headers.get("location", "nowhere").partition("/callbacks/")[0]
        mend = f"set {CALLBACKS} to the address behind the redirect: the upstream follows none"
        return fault(f"{url} redirects to {to[:200]}", mend)
    try:
        status = read_object(answer.body).get("status")
    except ValueError:
        status = None
    if answer.status == 200 and status == "accepted":
        if url.startswith("https:"):
            return ok(f"a signed probe came back through {url}")
        mend = f"set {CALLBACKS} to an https address before the upstream is a public one"
        return warning(f"a signed probe came back through {url}, which is not https", mend)
    if answer.status == 401 and b'"unauthorized"' in answer.body:
        mend = "give every process the same DARKROOM_SECRET_KEY, or correct the address"
        return fault(f"{url} leads to a darkroom with another secret key", mend)
    mend = f"let the proxy pass /callbacks/* at {CALLBACKS} on to this service unchanged"
    return fault(f"{url} answers {answer.status}, and not as this service does", mend)
