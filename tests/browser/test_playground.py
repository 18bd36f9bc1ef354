"""The playground, as a person uses it."""

import re
from io import BytesIO

import pytest
from PIL import Image
from playwright.async_api import Browser, FilePayload, Page, expect

from tests.browser.people import NARROW, WIDE, WIDTHS, complaints, person
from tests.world import World

PLAYGROUND = "/console/playground"
EDITS = "wan2.5-image-to-image"


def picture(colour: str = "teal") -> bytes:
    file = BytesIO()
    Image.new("RGB", (400, 400), colour).save(file, "PNG")
    return file.getvalue()


def upload(name: str, content: bytes) -> FilePayload:
    return {"name": name, "mimeType": "image/png", "buffer": content}


async def tasks(here: World) -> list[str]:
    return [task["id"] for task in (await here.client.get("/v1/tasks")).json()["data"]]


async def references(page: Page, count: int) -> list[str]:
    """Their values, once the page has that many."""
    found = page.locator("input[type=hidden][name=image]")
    await expect(found).to_have_count(count)
    return [await each.input_value() for each in await found.all()]


async def fill(page: Page, label: str, text: str) -> None:
    """Types, and waits until the server has checked the form."""
    async with page.expect_response(lambda answer: answer.request.method == "POST"):
        await page.get_by_label(label).fill(text)


@pytest.mark.parametrize("width", WIDTHS)
async def test_a_prompt_becomes_a_picture_with_its_cost(
    browser: Browser, here: World, width: int
) -> None:
    """The estimate stands beside the button, the progress is live, the picture has its aspect."""
    async with person(browser, here, width) as page:
        await page.goto(PLAYGROUND)
        await page.get_by_label("Prompt", exact=False).first.fill("灯塔 in the fog")
        await expect(page.locator("#prompt-count")).to_have_text("13 of 2000 characters")
        await page.locator("#size").select_option("1920x1080")
        await fill(page, "Pictures", "2")
        await expect(page.locator("#estimate")).to_contain_text("4 credits")
        await expect(page.locator("#estimate")).to_contain_text("2 × 2")
        await page.get_by_role("button", name="Send").locator("visible=true").click()
        await page.wait_for_url("**/console/playground?task=task_*")
        pictures = page.locator("#result .picture img")
        await expect(pictures).to_have_count(2)
        await expect(page.locator("#result .badge")).to_have_text("completed")
        aspect = (
            "() => { const box = document.querySelector('.picture img').getBoundingClientRect();"
        )
        shown = await page.evaluate(f"{aspect} return box.width / box.height; }}")
        assert shown == pytest.approx(16 / 9, rel=0.02)
        assert await complaints(page) == []
        await expect(page.locator("#recent")).to_contain_text("灯塔 in the fog")
        await expect(page.locator("#recent-title + p")).to_contain_text("completed")


async def test_a_double_click_pays_once(browser: Browser, here: World) -> None:
    """With scripts the second click is not sent. Without them the idempotency key makes the second
    request the first one.
    """
    for scripts in (True, False):
        before = len(await tasks(here))
        async with person(browser, here, java_script_enabled=scripts) as page:
            await page.goto(PLAYGROUND)
            await page.locator("#prompt").fill(f"twice {scripts}")
            await page.get_by_role("button", name="Send").locator("visible=true").dblclick()
            await page.wait_for_url("**?task=*")
        assert len(await tasks(here)) == before + 1


async def test_a_form_that_comes_back_pays_once(browser: Browser, here: World) -> None:
    """Somebody goes back and sends the same form again: the key in it is the same."""
    async with person(browser, here, java_script_enabled=False) as page:
        await page.goto(PLAYGROUND)
        await page.locator("#prompt").fill("once")
        key = await page.locator("#order [name=idempotency_key]").input_value()
        await page.get_by_role("button", name="Send").locator("visible=true").click()
        await page.wait_for_url("**?task=*")
        first = page.url
        await page.goto(PLAYGROUND)
        await page.locator("#prompt").fill("once")
        sent = {
            name: await page.locator(f"#order [name={name}]").input_value()
            for name in ("csrf", "size")
        }
        fields = {**sent, "idempotency_key": key, "model": "wan2.5-text-to-image", "act": "send"}
        answer = await page.request.post(
            PLAYGROUND, form={**fields, "prompt": "once", "n": "1", "prompt_extend": "true"}
        )
        assert answer.url == first


async def test_only_the_fields_of_the_model_are_shown(browser: Browser, here: World) -> None:
    async with person(browser, here) as page:
        await page.goto(PLAYGROUND)
        await page.locator("#prompt").fill("kept")
        assert await page.locator("#negative_prompt, #prompt_extend").count() == 2
        assert await page.locator("#references, #seed").count() == 0
        await page.get_by_label("Model").select_option("z-image-turbo")
        await expect(page.get_by_label("Seed")).to_be_visible()
        assert await page.locator("#negative_prompt, #prompt_extend, #references").count() == 0
        await expect(page.locator("#prompt")).to_have_value("kept")
        await page.get_by_label("Model").select_option(EDITS)
        await expect(page.get_by_text("Reference images")).to_be_visible()


@pytest.mark.parametrize(
    ("field", "text", "said"),
    [
        ("prompt", "x" * 2001, "2001"),
        ("width", "100", "589824"),
        ("n", "9", "4"),
        ("negative_prompt", "y" * 501, "500"),
    ],
)
async def test_an_error_stands_at_its_field_while_typing(
    browser: Browser, here: World, field: str, text: str, said: str
) -> None:
    """The message names the limit. Nothing was sent."""
    before = await tasks(here)
    async with person(browser, here) as page:
        await page.goto(PLAYGROUND)
        if field == "width":
            await page.locator("#size").select_option("custom")
            await page.locator("#height").fill("100")
        await page.locator(f"#{field}").fill(text)
        name = "size" if field == "width" else field
        await expect(page.locator(f"#{name}-error")).to_contain_text(said)
        await expect(page.locator(f"#{name}")).to_have_attribute("aria-invalid", "true")
    assert await tasks(here) == before


async def test_free_pixels_are_sent(browser: Browser, here: World) -> None:
    async with person(browser, here) as page:
        await page.goto(PLAYGROUND)
        await page.locator("#prompt").fill("free")
        await page.locator("#size").select_option("custom")
        await page.get_by_label("Width in pixels").fill("1000")
        await page.get_by_label("Height in pixels").fill("800")
        await expect(page.locator("#size-note")).to_contain_text("589824 to 2073600")
        await page.get_by_role("button", name="Send").locator("visible=true").click()
        await page.wait_for_url("**?task=*")
        task = await here.task(page.url.rpartition("=")[2])
        assert task["request"]["size"] == "1000x800"


async def test_references_come_by_upload_drop_paste_link_and_gallery_and_change_order(
    browser: Browser, here: World
) -> None:
    result = await here.ended((await here.submit(prompt="for the gallery"))["id"])
    async with person(browser, here) as page:
        await page.goto(f"{PLAYGROUND}?model={EDITS}")
        await page.locator("#upload").set_input_files([upload("a.png", picture())])
        rows = page.locator(".references li")
        await expect(rows).to_have_count(1)
        for kind in ("drop", "paste"):
            await page.evaluate(DROPPED, {"kind": kind, "bytes": list(picture("navy"))})
            await expect(rows).to_have_count(2 if kind == "drop" else 3)
        await page.get_by_label("Link of a picture").fill("https://example.com/a.png")
        await page.get_by_role("button", name="Add", exact=True).click()
        await expect(rows).to_have_count(4)
        await page.get_by_text("From the gallery").click()
        await page.locator(f".picks button[value='add:{result['images'][0]['id']}']").click()
        await expect(rows).to_have_count(5)
        before = await references(page, 5)
        assert [value[:4] for value in before] == ["file", "file", "file", "http", "img_"]
        await page.get_by_role("button", name="Move reference 5 earlier").click()
        await expect(rows.nth(3)).to_contain_text("img_")
        await rows.nth(0).drag_to(rows.nth(2))
        await expect(rows.nth(2)).to_contain_text(before[0])
        await page.get_by_role("button", name="Remove reference 5").click()
        await expect(rows).to_have_count(4)
        assert await references(page, 4) == [before[1], before[2], before[0], before[4]]
        assert await complaints(page) == []
        await page.locator("#prompt").fill("a starry sky")
        await page.get_by_role("button", name="Send").locator("visible=true").click()
        await page.wait_for_url("**?task=*")
        task = await here.ended(page.url.rpartition("=")[2])
        assert [each["id"] for each in task["inputs"]] == [
            before[1],
            before[2],
            before[0],
            before[4],
        ]


DROPPED = """async ({ kind, bytes }) => {
  const moved = new DataTransfer();
  moved.items.add(new File([new Uint8Array(bytes)], `${kind}.png`, { type: "image/png" }));
  const given = { bubbles: true, cancelable: true };
  document.querySelector(kind === "drop" ? "#drop" : "#prompt").dispatchEvent(kind === "drop"
    ? new DragEvent("drop", { ...given, dataTransfer: moved })
    : new ClipboardEvent("paste", { ...given, clipboardData: moved }));
}"""


async def test_a_file_that_is_no_picture_is_an_error_at_the_references(
    browser: Browser, here: World
) -> None:
    async with person(browser, here) as page:
        await page.goto(f"{PLAYGROUND}?model={EDITS}")
        await page.locator("#upload").set_input_files([upload("a.png", b"no picture")])
        await expect(page.locator("#image_urls-error")).to_contain_text("image_urls")
        assert await references(page, 0) == []


async def test_references_work_without_scripts(browser: Browser, here: World) -> None:
    async with person(browser, here, NARROW, java_script_enabled=False) as page:
        await page.goto(PLAYGROUND)
        await page.get_by_label("Model").select_option(EDITS)
        await page.get_by_role("button", name="Show its fields").click()
        await page.locator("#upload").set_input_files(
            [upload("a.png", picture()), upload("b.png", picture("navy"))]
        )
        await page.get_by_role("button", name="Upload").click()
        first, second = await references(page, 2)
        await page.get_by_role("button", name="Move reference 2 earlier").click()
        shown = page.locator("input[type=hidden][name=image]")
        await expect(shown.first).to_have_value(second)
        assert await references(page, 2) == [second, first]
        await page.get_by_role("button", name="Remove reference 1").click()
        assert await references(page, 1) == [first]
        await page.locator("#prompt").fill("without scripts")
        await page.get_by_role("button", name="Send").locator("visible=true").click()
        await page.wait_for_url("**?task=*")
        task = await here.ended(page.url.rpartition("=")[2])
        assert [each["id"] for each in task["inputs"]] == [first]


async def test_a_result_is_used_again_edited_and_as_a_reference(
    browser: Browser, here: World
) -> None:
    task = await here.ended((await here.submit(prompt="a harbour", n=2))["id"])
    image = task["images"][0]["id"]
    async with person(browser, here) as page:
        await page.goto(f"{PLAYGROUND}?task={task['id']}")
        await page.get_by_role("button", name="Again").click()
        await page.wait_for_url(lambda url: task["id"] not in url)
        copy = await here.task(page.url.rpartition("=")[2])
        assert (copy["prompt"], copy["request"]) == (task["prompt"], task["request"])
        await page.goto(f"{PLAYGROUND}?task={task['id']}")
        await page.get_by_role("link", name="Edit and send").click()
        await expect(page.locator("#prompt")).to_have_value("a harbour")
        await expect(page.locator("#n")).to_have_value("2")
        await page.goto(f"{PLAYGROUND}?task={task['id']}")
        await page.get_by_role("link", name="Use as reference").first.click()
        await expect(page.get_by_label("Model")).to_have_value(EDITS)
        assert await references(page, 1) == [image]


async def test_the_request_is_shown_as_three_programs(browser: Browser, here: World) -> None:
    """They have what the form has, also a prompt with quotes."""
    async with person(browser, here) as page:
        await page.goto(PLAYGROUND)
        await page.locator("#prompt").fill('it\'s "quoted" </pre><b>灯</b>')
        await expect(page.locator("#sample-curl")).to_contain_text(
            'it\'"\'"\'s \\"quoted\\" </pre>'
        )
        for title in ("Python", "JavaScript"):
            await page.get_by_text(title, exact=True).click()
        await expect(page.locator("#sample-python")).to_contain_text("</pre><b>灯</b>")
        await expect(page.locator("#sample-javascript")).to_contain_text("JSON.stringify({")
        compile(await page.locator("#sample-python").inner_text(), "sample", "exec")


async def test_what_is_left_of_the_budget_stands_beside_the_button(
    browser: Browser, here: World
) -> None:
    body = {"owner": "spender", "scopes": ["submit", "read"]}
    budget = {"credits": 10, "period": "month"}
    key = (await here.client.post("/v1/keys", json={**body, "budget": budget})).json()["key"]
    async with person(browser, here, WIDE, key) as page:
        await page.goto(PLAYGROUND)
        await expect(page.locator("#estimate")).to_contain_text("10 of 10 left in the budget")
        await page.locator("#prompt").fill("too many")
        await page.locator("#n").fill("4")
        await page.get_by_role("button", name="Send").locator("visible=true").click()
        await page.wait_for_url("**?task=*")
        await page.goto(PLAYGROUND)
        await expect(page.locator("#estimate")).to_contain_text(
            re.compile(r"[2-6](\.\d)? of 10 left")
        )


async def test_the_prompt_is_extended_unless_it_is_switched_off(
    browser: Browser, here: World
) -> None:
    """The box is checked by default. "Edit and send" keeps how it was."""
    for checked in (True, False):
        async with person(browser, here) as page:
            await page.goto(PLAYGROUND)
            await page.locator("#prompt").fill("as it is")
            await page.get_by_label("Extend the prompt").set_checked(checked)
            await page.get_by_role("button", name="Send").locator("visible=true").click()
            await page.wait_for_url("**?task=*")
            task = await here.task(page.url.rpartition("=")[2])
            assert task["request"].get("prompt_extend", True) is checked
            await page.get_by_role("link", name="Edit and send").click()
            await expect(page.get_by_label("Extend the prompt")).to_be_checked(checked=checked)


async def test_metadata_is_sent_and_comes_back(browser: Browser, here: World) -> None:
    """One pair a line. A line without a sign of equality is an error at the field, while typing."""
    async with person(browser, here) as page:
        await page.goto(PLAYGROUND)
        await page.locator("#prompt").fill("for an order")
        await page.locator("#more-metadata summary").click()
        await page.locator("#metadata").fill("order")
        await expect(page.locator("#metadata-error")).to_contain_text("lines such as order=7")
        await fill(page, "Metadata", "order=7 = seven\n客户 = 王")
        await expect(page.locator("#metadata-error")).to_be_hidden()
        await expect(page.locator("#sample-curl")).to_contain_text('"order": "7 = seven"')
        await page.get_by_role("button", name="Send").locator("visible=true").click()
        await page.wait_for_url("**?task=*")
        task = await here.task(page.url.rpartition("=")[2])
        assert task["metadata"] == {"order": "7 = seven", "客户": "王"}
        await expect(page.locator("#result")).to_contain_text("7 = seven")
        await page.get_by_role("link", name="Edit and send").click()
        await expect(page.locator("#metadata")).to_have_value("order=7 = seven\n客户=王")
