"""The requests that the sandbox upstream refuses, and the faults that it accepts."""

from decimal import Decimal
from typing import Any

import pytest

from service.errors import ApiError
from service.upstreams.catalogue import load_catalogue
from service.upstreams.sandbox.checks import KEY, Order, drawn_size, read_body, read_key, read_order
from service.upstreams.sandbox.effects import contradicting
from service.upstreams.sandbox.faults import read_faults

CATALOGUE = load_catalogue()
TEXT = {"model": "wan2.5-text-to-image", "prompt": "a cat"}
EDIT = {
    "model": "wan2.5-image-to-image",
    "prompt": "a cat",
    "image_urls": ["https://files.example.com/a.png"],
}


def test_a_bare_order_gets_the_documented_defaults() -> None:
    """One image of 1280x1280, at the price of the catalogue."""
    assert read_order(TEXT, CATALOGUE) == Order(
        "wan2.5-text-to-image", "a cat", 1280, 1280, 1, None, price=Decimal(2)
    )


@pytest.mark.parametrize(
    "body",
    [
        TEXT | {"size": "768x768", "n": 4, "prompt_extend": False, "negative_prompt": "x" * 500},
        TEXT | {"size": "1440x1440", "prompt": "字" * 2000},
        TEXT | {"size": "384x1536"},
        TEXT | {"size": "1536x384", "image_urls": "ignored", "quality": "hd", "n": None},
        EDIT | {"size": "1280x1280", "image_urls": ["https://files.example.com/a.png"] * 5},
    ],
)
def test_a_request_on_the_limits_is_accepted(body: dict[str, Any]) -> None:
    """Limits are inclusive, lengths are in characters and not in bytes, and unknown fields are
    ignored.
    """
    assert read_order(body, CATALOGUE).model == body["model"]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"prompt": "a"}, 400, "model"),
        (TEXT | {"model": 5}, 400, "model"),
        (TEXT | {"model": "dall-e-9"}, 403, "model"),
        ({"model": "wan2.5-text-to-image"}, 400, "prompt"),
        (TEXT | {"prompt": " \n"}, 400, "prompt"),
        (TEXT | {"callback_url": 7}, 400, "callback_url"),
        (TEXT | {"callback_url": "https://example.com/" + "a" * 2048}, 400, "callback_url"),
        (EDIT | {"image_urls": ["ftp://files.example.com/a.png"]}, 400, "image_urls"),
    ],
)
def test_a_request_that_the_upstream_would_refuse_is_refused(
    body: dict[str, Any], status: int, param: str
) -> None:
    """Each refusal has its documented status and names the field."""
    with pytest.raises(ApiError) as refusal:
        read_order(body, CATALOGUE)
    assert (refusal.value.status, refusal.value.param) == (status, param)
    assert param in refusal.value.message


@pytest.mark.parametrize("model", CATALOGUE.models)
def test_the_example_of_each_model_of_the_catalogue_is_accepted(model: str) -> None:
    """Its images have a size within a few megapixels, and their number is that of the model."""
    order = read_order(CATALOGUE.document(model)["example"], CATALOGUE)
    assert 700_000 < order.width * order.height <= 4_200_000
    assert order.n == (4 if model == "mj-v7" else 1)
    assert order.per == ("request" if model == "mj-v7" else "image")


@pytest.mark.parametrize(
    ("size", "drawn"),
    [
        ("768x1024", (768, 1024)),
        ("1:1", (1024, 1024)),
        ("16:9", (1365, 768)),
        ("1:8", (362, 2896)),
        ("2K", (2048, 2048)),
        ("auto", (1024, 1024)),
        (None, (1024, 1024)),
    ],
)
def test_a_ratio_is_drawn_with_about_a_megapixel(size: str | None, drawn: tuple[int, int]) -> None:
    assert drawn_size(size) == drawn


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "z-image-turbo", "prompt": "a", "size": "7:5"}, "size"),
        ({"model": "z-image-turbo", "prompt": "a", "negative_prompt": "b"}, "negative_prompt"),
        ({"model": "gpt-image-2", "prompt": "x" * 32001}, "prompt"),
        ({"model": "gpt-4o-image", "prompt": "a", "n": 3}, "n"),
        ({"model": "krea-2-turbo", "prompt": "a", "quality": "4K"}, "quality"),
        ({"model": "mj-v7", "prompt": "a", "model_params": {"speed": "x"}}, "model_params.speed"),
        ({"model": "qwen-image-edit", "prompt": "a"}, "image_urls"),
    ],
)
def test_the_sandbox_refuses_what_the_catalogue_refuses(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refusal:
        read_order(body, CATALOGUE)
    assert (refusal.value.status, refusal.value.param) == (400, param)
    violation = CATALOGUE.check(body)
    assert violation is not None
    assert violation.message == refusal.value.message


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b'"text"', b"\xff{}", b"[" * 100_000])
def test_a_body_that_is_no_object_is_refused(raw: bytes) -> None:
    """The status is 400 for any bytes."""
    with pytest.raises(ApiError) as refusal:
        read_body(raw)
    assert refusal.value.status == 400


def test_an_idempotency_key_has_16_to_96_safe_characters() -> None:
    """The key may be missing. A malformed one is refused."""
    assert read_key(None) is None
    assert read_key("task_" + "a" * 26) == "task_" + "a" * 26
    assert not KEY.fullmatch("a" * 97)
    with pytest.raises(ApiError):
        read_key("too short")


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ("fail", "object"),
        ({"explode": True}, "'explode'"),
        ({"delay": -1}, "sandbox.delay"),
        ({"delay": True}, "sandbox.delay"),
        ({"delay": "1"}, "sandbox.delay"),
        ({"fail": "bad_luck"}, "sandbox.fail"),
        ({"cancel": True}, "sandbox.cancel"),
        ({"repeat_callback": 0}, "sandbox.repeat_callback"),
        ({"drop_callback": 1}, "sandbox.drop_callback"),
        ({"format": "svg"}, "sandbox.format"),
        ({"images": 5}, "sandbox.images"),
        ({"images": 1.0}, "sandbox.images"),
        ({"results": "strings"}, "sandbox.results"),
        ({"usage": "free"}, "sandbox.usage"),
        ({"usage": -0.5}, "sandbox.usage"),
        ({"usage": float("nan")}, "sandbox.usage"),
        ({"file_content": []}, "sandbox.file_content"),
        ({"file_type": "image/png\r\nx: y"}, "sandbox.file_type"),
        ({"file_redirect": "elsewhere"}, "sandbox.file_redirect"),
        ({"file_redirect": "http://x/\r\nx: y"}, "sandbox.file_redirect"),
        ({"file_redirect": "http://x/ü"}, "sandbox.file_redirect"),
        ({"file_length": True}, "sandbox.file_length"),
        ({"file_cut": -1}, "sandbox.file_cut"),
        ({"submit_status": {"status": 429, "times": True}}, "sandbox.submit_status"),
        ({"submit_status": True}, "sandbox.submit_status"),
        ({"submit_status": 200}, "sandbox.submit_status"),
        ({"submit_status": {"html": True}}, "sandbox.submit_status"),
        ({"submit_status": {"status": 429, "code": "Ü"}}, "sandbox.submit_status"),
        ({"query_status": {"status": 500, "colour": "red"}}, "sandbox.query_status"),
    ],
)
def test_an_unknown_fault_is_refused_by_name(asked: object, named: str) -> None:
    """A typing error must not look like a fault that did not happen."""
    with pytest.raises(ValueError, match=named):
        read_faults(asked, {})


def test_a_contradiction_is_terminal_and_of_the_other_kind() -> None:
    """A completed task becomes failed, and any other task completed. The id stays."""
    assert contradicting({"id": "t", "status": "completed", "results": ["x"]})["status"] == "failed"
    completed = contradicting({"id": "t", "status": "failed", "error": {}})
    assert (completed["id"], completed["status"], "error" in completed) == ("t", "completed", False)
    assert "result_data" not in contradicting(
        {"id": "t", "status": "completed", "result_data": [{"image_url": "x"}]}
    )


def test_an_error_page_is_shown_at_most_times_times() -> None:
    """`times` lets a later attempt succeed. An HTML page has several kilobytes, also with status
    524.
    """
    page = read_faults(
        {"submit_status": {"status": 524, "html": True, "times": 1, "retry_after": 3}}, {}
    )["submit_status"]
    first = page.answer(0)
    assert (first.status, first.headers["content-type"], first.headers["retry-after"]) == (
        524,
        "text/html; charset=utf-8",
        "3",
    )
    assert len(first.body) > 2048
    assert page.answer(1) is None
