"""Input images of submissions: files, results, links and data: URLs, as the upstream gets them."""

import base64
from ipaddress import ip_network
from typing import Any

import httpx
import pytest

from service.upstreams.sandbox import SandboxOptions
from tests.api import ASYNC, SUBMIT, UNTIL_DONE, got, refused
from tests.inputs import of_length, photo, upload, uploaded
from tests.waiting import wait_until
from tests.world import LOOPBACK, World, world

EDIT = "wan2.5-image-to-image"
JSON = dict[str, Any]


def edit(*urls: str, **fields: Any) -> JSON:
    return {
        "model": EDIT,
        "prompt": "at night",
        "size": "768x768",
        "image_urls": list(urls),
    } | fields


async def edited(client: httpx.AsyncClient, *urls: str, **fields: Any) -> JSON:
    return got(await client.post(SUBMIT, json=edit(*urls, **fields), headers=UNTIL_DONE))


async def received(here: World, task: JSON) -> JSON:
    """The task as the upstream has it."""
    tasks = (await here.sandbox.get("/sandbox/tasks")).json()["data"]
    found: JSON = next(each for each in tasks if each["id"] == task["upstream_id"])
    return found


async def posted(here: World, task: JSON) -> list[str]:
    """The links that the upstream got."""
    return list((await received(here, task))["image_urls"])


async def sent(here: World) -> int:
    return len((await here.sandbox.get("/sandbox/tasks")).json()["data"])


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


async def test_every_kind_of_entry_reaches_the_upstream_in_its_order(here: World) -> None:
    """The upstream gets links alone, each of which leads to the bytes of that entry."""
    inline, public = photo("WEBP"), "https://x.test/public.png"
    async with here.owner() as client:
        file = await uploaded(client, photo("JPEG"))
        first = await edited(client, public, file["id"], sandbox={"format": "jpeg"})
        image = first["images"][0]
        task = await edited(client, image["id"], image["url"], data_url(inline), public, file["id"])
        assert task["state"] == "completed", task
        urls = await posted(here, task)
        contents = [(await client.get(url)).content for url in urls if url != public]
        stored = (await client.get(f"/images/{image['id']}")).content
    assert contents == [stored, stored, inline, photo("JPEG")]
    assert urls[3] == public
    ids = [each["id"] for each in task["inputs"]]
    assert ids[:2] == [image["id"]] * 2
    assert ids[2].startswith("file_")
    assert ids[3:] == [None, file["id"]]
    assert task["inputs"][3] == {
        "id": None,
        "url": public,
        "sha256": None,
        "width": None,
        "height": None,
    }
    assert task["inputs"][4] == {
        "id": file["id"],
        "url": None,
        "sha256": file["sha256"],
        "width": 400,
        "height": 390,
    }
    shown = task["request"]["image_urls"]
    assert shown == [image["id"], image["url"], ids[2], public, file["id"]]


MASKED = {"model": "gpt-4o-image", "size": "1:1", "prompt": "a hat"}


@pytest.mark.parametrize("kind", ["file", "result", "link of a file", "link of a result", "data"])
@pytest.mark.parametrize("images", [0, 1])
async def test_a_mask_of_the_service_reaches_the_upstream(
    here: World, kind: str, images: int
) -> None:
    """The upstream gets a link to its bytes. The task shows it last of its inputs."""
    content = photo("PNG", mode="RGBA")
    async with here.owner() as client:
        file = got(await upload(client, content, model="gpt-4o-image"), 201)
        body = {**MASKED, "image_urls": [file["id"]] * images}
        masks = {"file": file["id"], "data": data_url(content)}
        masks["link of a file"] = f"{here.url}/v1/files/{file['id']}/content"
        if "result" in kind:
            first = got(await client.post(SUBMIT, json=MASKED, headers=UNTIL_DONE))
            image = first["images"][0]
            content = (await client.get(f"/images/{image['id']}")).content
            masks |= {"result": image["id"], "link of a result": image["url"]}
        mask = masks[kind]
        body["mask_url"] = mask
        task = got(await client.post(SUBMIT, json=body, headers=UNTIL_DONE))
        assert task["state"] == "completed", task
        shown = task["inputs"][-1]["id"]
        assert len(task["inputs"]) == images + 1
        assert task["request"]["mask_url"] == (shown if kind == "data" else mask)
        link = (await received(here, task))["mask_url"]
        assert (await client.get(link)).content == content


@pytest.mark.parametrize(
    ("mask", "word"),
    [
        ("file_" + "a" * 26, "no file of yours"),
        ("img_" + "a" * 26, "no stored image of yours"),
        ("data:image/png;base64,!!!!", "base64"),
        (data_url(photo("BMP")), "BMP"),
        (data_url(of_length((10 << 20) + 1)), str((10 << 20) + 1)),
    ],
)
async def test_a_wrong_mask_is_refused_before_anything_is_sent(
    here: World, mask: str, word: str
) -> None:
    """Nothing stays of the other inputs."""
    async with here.owner() as client:
        before = await sent(here)
        body = {**MASKED, "image_urls": [data_url(photo())], "mask_url": mask}
        error = refused(await client.post(SUBMIT, json=body), 400, param="mask_url")
        assert error["message"].startswith("mask_url: ")
        assert word in error["message"]
        assert got(await client.get("/v1/files"))["data"] == []
        assert await sent(here) == before


async def test_a_public_mask_goes_to_the_upstream_as_it_is(here: World) -> None:
    async with here.owner() as client:
        body = {**MASKED, "mask_url": "https://x.test/mask.png"}
        task = got(await client.post(SUBMIT, json=body, headers=UNTIL_DONE))
        assert (await received(here, task))["mask_url"] == body["mask_url"]
        assert task["inputs"] == []


async def test_an_upload_is_remembered(here: World) -> None:
    """The second task with a file uploads nothing."""
    async with here.owner() as client:
        file = await uploaded(client)
        links = [await posted(here, await edited(client, file["id"])) for _ in range(2)]
        content = f"{here.url}/v1/files/{file['id']}/content"
        forms = (content, f" {content}?a=1#b", content.replace("http", "HTTP"), content[:-8])
        links += [await posted(here, await edited(client, form)) for form in forms]
    assert all(each == links[0] for each in links)


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ("file_" + "a" * 26, "no file of yours"),
        ("img_" + "a" * 26, "no stored image of yours"),
        ("ftp://x.test/a.png", "is not"),
        ("a.png", "is not"),
        ("https://x.test/" + "a" * 2040, "2048"),
        ("http://8.8.8.8/a.png", "plain http"),
        ("https://10.0.0.1/a.png", "not globally routable"),
        ("https://me:word@x.test/a.png", "user name"),
        ("data:image/png;base64", "comma"),
        ("data:image/png;base64,!!!!", "base64"),
        (data_url(b"GIF89a"), "no picture"),
        (data_url(photo("GIF", mode="P")), "GIF"),
        (data_url(photo("PNG", mode="RGBA")), "alpha"),
        (data_url(photo("PNG", (383, 500))), "383x500"),
        (data_url(of_length((10 << 20) + 1)), str((10 << 20) + 1)),
    ],
)
async def test_a_wrong_entry_is_refused_before_anything_is_sent(
    here: World, entry: str, word: str
) -> None:
    """The refusal names the place in the list, the limit and what was measured."""
    async with here.owner() as client:
        file, before = await uploaded(client), await sent(here)
        answer = await client.post(SUBMIT, json=edit(file["id"], entry))
        error = refused(answer, 400, param="image_urls")
        assert got(await client.get("/v1/tasks"))["data"] == []
    assert word in error["message"], error
    assert "image_urls[1]" in error["message"]
    assert await sent(here) == before


@pytest.mark.parametrize("prefix", ["task_", "task-unified-"])
async def test_a_link_below_the_public_address_of_images_names_a_result(
    tmp_path: Any, prefix: str
) -> None:
    async with world(
        tmp_path, sandbox=options(), image_base_url="https://cdn.example/i", task_id_prefix=prefix
    ) as there:
        first = await edited(there.client, (await uploaded(there.client))["id"])
        task = await edited(there.client, first["results"][0])
        assert task["inputs"][0]["id"] == first["images"][0]["id"]


async def test_images_of_other_owners_are_refused_alike(here: World) -> None:
    async with here.owner() as one, here.owner() as other:
        file = await uploaded(one)
        image = (await edited(one, file["id"]))["images"][0]
        for entry in (file["id"], image["id"], image["url"]):
            refused(await other.post(SUBMIT, json=edit(entry)), 400, param="image_urls")


async def test_a_data_url_of_ten_megabytes_is_estimated_and_accepted(here: World) -> None:
    async with here.owner() as client:
        url = data_url(of_length(10 << 20), "image/jpeg")
        assert (await edited(client, url))["state"] == "completed"
        estimate = await client.post("/v1/estimates", json=edit(url))
        assert got(estimate)["credits"] == 2
        answer = await client.post(SUBMIT, json=edit("https://x.test/a", x="a" * (1 << 20)))
        refused(answer, 413)


async def test_an_erased_file_is_erased_at_the_upstream(here: World) -> None:
    """A task that was submitted with it does not need it any more."""
    async with here.owner() as client:
        file = await uploaded(client)
        (link,) = await posted(here, await edited(client, file["id"]))
        assert (await client.get(link)).status_code == 200
        assert (await client.delete(f"/v1/files/{file['id']}")).status_code == 204
        assert (await client.get(link)).status_code == 404


async def test_an_erased_result_is_erased_at_the_upstream(here: World) -> None:
    """It was the input of another task, which keeps its own result."""
    async with here.owner() as client:
        first = await edited(client, (await uploaded(client))["id"])
        task = await edited(client, first["images"][0]["id"])
        (link,) = await posted(here, task)
        assert (await client.get(link)).status_code == 200
        assert (await client.delete(f"/v1/tasks/{first['id']}")).status_code == 204
        assert (await client.get(link)).status_code == 404
        refused(
            await client.post(SUBMIT, json=edit(first["images"][0]["id"])), 400, param="image_urls"
        )
        shown = await client.get(task["images"][0]["url"])
        assert shown.status_code == 200


# --- an upstream whose files fail


def options(**faults: Any) -> SandboxOptions:
    return SandboxOptions(
        networks=(ip_network(LOOPBACK),), delay_s=0.05, callback_delays_s=(0.05,), faults=faults
    )


@pytest.mark.parametrize(
    "faults",
    [
        {"upload_status": {"status": 500, "times": 2}},
        {"upload_status": {"status": 502, "html": True, "times": 2}},
        {"upload_status": {"status": 429, "times": 1}},
        {"upload_status": {"status": 401, "times": 1}},
    ],
)
async def test_an_upload_that_fails_is_tried_again_and_paid_once(
    tmp_path: Any, faults: JSON
) -> None:
    async with world(tmp_path, sandbox=options(**faults)) as there:
        file = await uploaded(there.client)
        task = await there.ended((await edited(there.client, file["id"]))["id"])
        assert task["state"] == "completed", task
        assert await sent(there) == 1
        assert "input.retried" in [step["step"] for step in await there.steps(task["id"])]


async def test_uploads_that_never_succeed_end_the_task_without_a_paid_call(tmp_path: Any) -> None:
    faults = options(lose_upload=True)
    async with world(tmp_path, sandbox=faults, submit_give_up_s=0.3) as there:
        file = await uploaded(there.client)
        task = await edited(there.client, file["id"])
        assert (task["state"], task["error"]["code"]) == ("failed", "not_submitted")
        assert await sent(there) == 0


async def test_a_file_erased_while_a_task_waits_with_it_fails_the_task(tmp_path: Any) -> None:
    async with world(tmp_path, sandbox=options(upload_status={"status": 500})) as there:
        file = await uploaded(there.client)
        task = got(await there.client.post(SUBMIT, json=edit(file["id"])))
        assert (await there.client.delete(f"/v1/files/{file['id']}")).status_code == 204
        task = await there.ended(task["id"])
        assert (task["state"], task["error"]["code"]) == ("failed", "input_gone")
        assert await sent(there) == 0


async def test_a_file_erased_during_its_upload_is_erased_at_the_upstream(tmp_path: Any) -> None:
    async with world(tmp_path, sandbox=options(upload_delay=2)) as there:

        async def copies() -> int:
            listed = (await there.sandbox.get("/api/v1/files/list")).json()["data"]
            return int(listed["total"])

        file = await uploaded(there.client)
        task = got(await there.client.post(SUBMIT, json=edit(file["id"]), headers=ASYNC))
        await wait_until(copies)
        assert (await there.client.delete(f"/v1/files/{file['id']}")).status_code == 204
        task = await there.ended(task["id"])
        assert (task["state"], task["error"]["code"]) == ("failed", "input_gone")
        assert await copies() == 0
        assert await sent(there) == 0


async def test_an_input_that_the_image_store_lost_is_named_as_the_reason(here: World) -> None:
    """The upstream is not blamed, and nothing is sent."""
    async with here.owner() as client:
        file, before = await uploaded(client), await sent(here)
        (path,) = here.settings.image_dir.glob(f"{file['id']}/*")
        path.unlink()
        task = got(await client.post(SUBMIT, json=edit(file["id"]), headers=ASYNC))

        async def reason() -> str | None:
            steps = await here.steps(task["id"])
            return next((each["reason"] for each in steps if "reason" in each), None)

        assert "is not as it was stored" in await wait_until(reason)
        assert await sent(here) == before
        assert (await client.post(f"/v1/tasks/{task['id']}/cancel")).status_code == 200


async def test_a_copy_that_expires_between_two_tries_is_made_anew(tmp_path: Any) -> None:
    """The upstream's copy lives shorter than a submission may wait: each try has a new one."""
    faults = {"upload_ttl": 60, "submit_status": {"status": 429, "times": 1, "retry_after": 0}}
    async with world(tmp_path, sandbox=options(**faults)) as there:
        file = await uploaded(there.client)
        task = await there.ended((await edited(there.client, file["id"]))["id"])
        assert task["state"] == "completed", task
        listed = (await there.sandbox.get("/api/v1/files/list")).json()["data"]
        assert listed["total"] == 2
        assert (await posted(there, task))[0] == listed["files"][0]["file_url"]


async def test_a_copy_that_the_upstream_lost_is_made_anew_after_its_refusal(here: World) -> None:
    """The upstream kept it for a shorter time than it said."""
    async with here.owner() as client:
        file = await uploaded(client)
        (link,) = await posted(here, await edited(client, file["id"]))
        lost = (await here.sandbox.get("/api/v1/files/list")).json()["data"]["files"][0]
        assert lost["file_url"] == link
        await here.sandbox.delete(f"/api/v1/files/{lost['file_id']}")

        async def accepted() -> bool:
            answer = await client.post(SUBMIT, json=edit(file["id"]), headers=UNTIL_DONE)
            return answer.status_code == 200

        assert not await accepted()
        await wait_until(accepted)


async def test_a_refusal_that_names_another_field_keeps_the_copies(tmp_path: Any) -> None:
    """The upstream refused the model, so it has not lost the input image."""
    async with world(tmp_path, sandbox=options()) as there:
        file = await uploaded(there.client)
        for _ in range(2):
            body = edit(file["id"], model="no-such-model")
            task = got(await there.client.post(SUBMIT, json=body, headers=ASYNC))
            task = await there.ended(task["id"])
            assert (task["state"], task["error"]["param"]) == ("failed", "model"), task
        listed = (await there.sandbox.get("/api/v1/files/list")).json()["data"]
        assert listed["total"] == 1
        assert (await there.sandbox.get(listed["files"][0]["file_url"])).status_code == 200


async def test_copies_that_no_task_needs_make_room_in_a_full_account(tmp_path: Any) -> None:
    """The upstream keeps 100 files of an account."""
    async with world(tmp_path, sandbox=options()) as there:
        file = await uploaded(there.client)
        await edited(there.client, file["id"])
        for number in range(99):
            answer = await there.sandbox.post(
                "/api/v1/files/upload/stream", files={"file": (f"{number}.png", photo("PNG"))}
            )
            assert answer.json()["success"], answer.text
        other = await uploaded(there.client)
        task = await there.ended((await edited(there.client, other["id"]))["id"])
        assert task["state"] == "completed", task
