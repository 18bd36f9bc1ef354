"""The doctor: the checks of the set-up. They run when an operator asks for them."""

from starlette.responses import Response

from service.web.console.visits import View, Visit

TONES = {"ok": "delivered", "warning": "paused", "fault": "dead", "skipped": "queued"}


async def doctor(visit: Visit) -> Response:
    found = await visit.call("GET /v1/doctor") if visit.query.get("run") else None
    return visit.render("doctor.html", found=found, tones=TONES)


VIEWS = (View("GET /console/doctor", doctor, "admin", "Doctor", "doctor"),)
