"""The sandbox's faults of uploads, by flag and by request."""

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.cli.sandbox_commands import default_faults
from service.upstreams.sandbox import SandboxOptions
from tests.api import SUBMIT, UNTIL_DONE, got
from tests.inputs import photo, uploaded
from tests.sandbox import QUICK, WAYS, sandbox, taken
from tests.world import LOOPBACK, world

UPLOAD = "/api/v1/files/upload"
FORMS = ("stream", "base64")
JSON = dict[str, Any]


@dataclass
class Uploads:
    """Uploads to a sandbox whose faults are defaults or in each request."""

    client: httpx.AsyncClient
    asked: JSON
    form: str
    options: JSON = field(default_factory=dict)

    def request(self, **asked: Any) -> JSON:
        asked = self.asked | asked
        if self.form == "base64":
            text = base64.b64encode(photo()).decode()
            body = {"base64_data": text} | ({"sandbox": asked} if asked else {})
            return {"url": f"{UPLOAD}/base64", "json": body}
        data = {"sandbox": json.dumps(asked)} if asked else {}
        return {"url": f"{UPLOAD}/stream", "data": data, "files": {"file": ("a.png", photo())}}

    async def send(self, **asked: Any) -> httpx.Response:
        return await self.client.post(**self.request(**asked))

    async def kept(self) -> int:
        listed = await self.client.get("/api/v1/files/list")
        return int(listed.json()["data"]["total"])


@asynccontextmanager
async def faulty(way: str, form: str, **faults: Any) -> AsyncIterator[Uploads]:
    flags = [f"{name}={json.dumps(value)}" for name, value in faults.items()]
    options = replace(QUICK, faults=default_faults(flags) if way == "flag" else {})
    async with sandbox(options) as client:
        yield Uploads(client, faults if way == "request" else {}, form)


@pytest.fixture(params=[(way, form) for way in WAYS for form in FORMS], ids="-".join)
def how(request: pytest.FixtureRequest) -> tuple[str, str]:
    way: tuple[str, str] = request.param
    return way


async def test_upload_status_fails_uploads_for_a_while(how: tuple[str, str]) -> None:
    """Nothing is stored meanwhile."""
    async with faulty(*how, upload_status={"status": 503, "times": 2}) as uploads:
        answers = [await uploads.send() for _ in range(2)]
        assert [answer.status_code for answer in answers] == [503, 503]
        assert answers[0].json()["error"]["code"] == "service_unavailable"
        assert await uploads.kept() == 0
        assert (await uploads.send()).status_code == 200
        assert await uploads.kept() == 1


@pytest.mark.parametrize("code", [40001, 40002, 40003, 50001])
async def test_upload_status_has_the_codes_of_the_file_api(how: tuple[str, str], code: int) -> None:
    async with faulty(*how, upload_status={"status": 400, "code": str(code)}) as uploads:
        answer = await uploads.send()
        expected = {"success": False, "code": code, "msg": "by a fault", "data": None}
        assert (answer.status_code, answer.json()) == (400, expected)


async def test_lose_upload_stores_the_file_without_a_response(how: tuple[str, str]) -> None:
    async with faulty(*how, lose_upload=True) as uploads:
        with pytest.raises(httpx.RemoteProtocolError):
            await uploads.send()
        assert await uploads.kept() == 1


async def test_upload_cut_breaks_the_response_off(how: tuple[str, str]) -> None:
    async with faulty(*how, upload_cut=9) as uploads:
        body, whole = await taken(uploads.client, "POST", **uploads.request())
        assert (len(body), whole) == (9, False)
        assert await uploads.kept() == 1


async def test_upload_delay_keeps_the_response_back(how: tuple[str, str]) -> None:
    async with faulty(*how, upload_delay=0.15) as uploads:
        answer = await uploads.send()
        assert answer.elapsed.total_seconds() >= 0.15


async def test_upload_ttl_lets_a_file_expire(how: tuple[str, str]) -> None:
    """A submission with it is refused."""
    async with faulty(*how, upload_ttl=0) as uploads:
        data = (await uploads.send()).json()["data"]
        assert data["expires_at"] == data["upload_time"]
        assert await uploads.kept() == 0
        assert (await uploads.client.get(data["file_url"])).status_code == 404
        body = {"model": "wan2.5-image-to-image", "prompt": "x", "image_urls": [data["file_url"]]}
        answer = await uploads.client.post(SUBMIT, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image_urls")


@pytest.mark.parametrize("form", FORMS)
async def test_a_request_switches_a_flag_off(form: str) -> None:
    async with faulty("flag", form, upload_status=500) as uploads:
        assert (await uploads.send(upload_status=None)).status_code == 200
        assert (await uploads.send()).status_code == 500


@pytest.mark.parametrize("form", FORMS)
async def test_a_share_of_the_uploads_meets_a_flag(form: str) -> None:
    options = replace(QUICK, faults={"upload_status": 500}, shares={"upload_status": 0.5})
    async with sandbox(options) as client:
        uploads = Uploads(client, {}, form)
        statuses = {(await uploads.send()).status_code for _ in range(12)}
    assert statuses == {200, 500}


@pytest.mark.parametrize("form", FORMS)
async def test_a_wrong_fault_of_an_upload_is_refused(form: str) -> None:
    async with faulty("request", form, upload_ttl=-1) as uploads:
        error = (await uploads.send()).json()["error"]
        assert (error["param"], "upload_ttl" in error["message"]) == ("sandbox", True)
        assert await uploads.kept() == 0


# --- the service on an upstream with these faults


@pytest.mark.parametrize(
    ("fault", "state", "code"),
    [
        ({"upload_cut": 9}, "failed", "not_submitted"),
        ({"upload_status": {"status": 413, "code": "40001"}}, "failed", "input_refused"),
        ({"upload_status": {"status": 400, "code": "40002"}}, "failed", "input_refused"),
        ({"upload_status": {"status": 403, "code": "40003", "times": 1}}, "completed", None),
    ],
)
async def test_a_task_whose_uploads_fail_is_retried_or_ends_unpaid(
    tmp_path: Path, fault: JSON, state: str, code: str | None
) -> None:
    options = SandboxOptions(networks=(ip_network(LOOPBACK),), delay_s=0.02, faults=fault)
    give_up_s = 0.5 if code == "not_submitted" else 600
    async with world(tmp_path, sandbox=options, submit_give_up_s=give_up_s) as here:
        file = await uploaded(here.client)
        body = {"model": "wan2.5-image-to-image", "prompt": "x", "image_urls": [file["id"]]}
        task = got(await here.client.post(SUBMIT, json=body, headers=UNTIL_DONE))
        assert (task["state"], task["error"] and task["error"]["code"]) == (state, code)
        charges = (await here.sandbox.get("/sandbox/charges")).json()["data"]
        assert len(charges) == (state == "completed")
