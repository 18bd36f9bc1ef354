"""The limits of the catalogue's models, and the prices of submissions."""

from typing import Any

import pytest

from service.credits import millionths
from service.upstreams.catalogue import Violation, load_catalogue
from service.upstreams.field_values import shown

CATALOGUE = load_catalogue()
TEXT, IMAGE = "wan2.5-text-to-image", "wan2.5-image-to-image"
LINKS = ["https://example.com/1.png"]
# The upstream's image models.
MODELS = {
    *("gpt-image-1", "gpt-image-1.5", "gpt-image-1.5-lite", "gpt-image-2", "gpt-image-2-beta"),
    *("gpt-4o-image", "gemini-2.5-flash-image", "gemini-3-pro-image-preview"),
    *("gemini-3.1-flash-image-preview", "gemini-3.1-flash-lite-image", "nano-banana-2-lite"),
    *("z-image-turbo", "krea-2-turbo", "doubao-seedream-3.0-t2i", "doubao-seedream-4.0"),
    *("doubao-seedream-4.5", "doubao-seedream-5.0-lite", "seedream-5.0-lite"),
    *("doubao-seededit-3.0-i2i", "doubao-seededit-4.0-i2i", "qwen-image-edit"),
    *("qwen-image-edit-plus", TEXT, IMAGE, "wan2.5-t2i-preview", "wan2.5-i2i-preview", "mj-v7"),
    *(
        f"mj-v7-{act}"
        for act in (
            *("upscale", "inpaint", "outpaint", "pan", "remix", "edit", "retexture"),
            *("remove-bg", "enhance", "upload-paint"),
        )
    ),
}


def check(model: str = TEXT, **fields: object) -> Violation | None:
    return CATALOGUE.check(
        {
            "model": model,
            "prompt": "a cat",
            **({"image_urls": LINKS} if model == IMAGE else {}),
            **fields,
        }
    )


def refused(field: str, *words: str, model: str = TEXT, **fields: object) -> None:
    violation = check(model, **fields)
    assert violation is not None
    assert violation.param == field
    assert all(word in violation.message for word in (field, *words)), violation.message


def test_the_catalogue_has_every_image_model_of_the_upstream() -> None:
    """Each names its source, and each of its limits and its price has one."""
    assert CATALOGUE.models.keys() == MODELS
    for entry in CATALOGUE.models.values():
        assert entry.source
        assert all(rule.source for rule in entry.fields.values())
        assert entry.price is None or entry.price.source


@pytest.mark.parametrize("model", sorted(MODELS))
def test_the_example_of_a_model_is_within_its_limits(model: str) -> None:
    document = CATALOGUE.document(model)
    assert document["example"]["model"] == model
    assert CATALOGUE.check(document["example"]) is None
    assert CATALOGUE.warnings(model, document["example"]) == []


@pytest.mark.parametrize(
    ("model", "size", "accepted"),
    [
        (TEXT, "768x768", True),
        (TEXT, "767x768", False),
        (TEXT, "1440x1440", True),
        (TEXT, "1441x1440", False),
        (TEXT, "1536x384", True),
        (TEXT, "384x1536", True),
        (TEXT, "1540x384", False),
        (TEXT, "2880x720", True),
        (TEXT, "2884x720", False),
        (TEXT, "16:9", False),
        (IMAGE, "1280x1280", True),
        (IMAGE, "1281x1280", False),
        ("gpt-image-2", "21:9", True),
        ("gpt-image-2", "1024x640", True),
        ("gpt-image-2", "1008x640", False),
        ("gpt-image-2", "3840x2160", True),
        ("gpt-image-2", "3840x2176", False),
        ("gpt-image-2", "3072x1024", True),
        ("gpt-image-2", "3088x1024", False),
        ("gpt-image-2", "1030x1024", False),
        ("z-image-turbo", "2:1", True),
        ("z-image-turbo", "376x1536", True),
        ("z-image-turbo", "375x1536", False),
        ("z-image-turbo", "376x1537", False),
        ("gemini-3-pro-image-preview", "1024x1024", False),
        ("gemini-3-pro-image-preview", "1:8", False),
        ("gemini-3.1-flash-lite-image", "1:8", True),
        ("gpt-4o-image", "1024x1536", True),
        ("gpt-4o-image", "1024x1537", False),
        ("doubao-seedream-4.0", "1K", True),
        ("doubao-seedream-4.5", "1K", False),
        ("doubao-seedream-4.5", "2560x1440", True),
        ("doubao-seedream-4.5", "2559x1440", False),
        ("doubao-seedream-4.5", "4096x4096", True),
        ("doubao-seedream-4.5", "4097x4096", False),
        ("doubao-seedream-4.0", "16384x1024", True),
        ("doubao-seedream-4.0", "16385x1024", False),
        ("mj-v7", "any", True),
    ],
)
def test_a_size_is_in_pixels_or_a_ratio_by_its_model(
    model: str, size: str, *, accepted: bool
) -> None:
    """The limits of the total, the sides, the aspect and the multiple are inclusive."""
    assert (check(model, size=size) is None) == accepted


@pytest.mark.parametrize("model", ["dall-e-9", None, 7, ["wan2.5-text-to-image"], {}])
def test_a_model_that_is_not_in_the_catalogue_passes_through(model: object) -> None:
    """The upstream checks the fields of other models, except the number of images."""
    body = {"model": model, "prompt": 7, "n": 1000, "size": "auto", "negative_prompt": 7}
    assert CATALOGUE.check(body) is None
    assert CATALOGUE.warnings(str(model), body) == []
    assert CATALOGUE.check({}) is None


def test_a_null_field_counts_as_absent() -> None:
    """Clients write null for a field that they leave to the upstream."""
    assert check(size=None, n=None, negative_prompt=None, image_urls=None) is None
    assert check("z-image-turbo", negative_prompt=None) is None


@pytest.mark.parametrize("prompt", ["x", "x" * 2000, "雪" * 2000, "\U0001f4a5" * 2000])
def test_a_prompt_is_counted_in_characters(prompt: str) -> None:
    """It is not counted in bytes or in UTF-16 units."""
    assert check(prompt=prompt) is None


@pytest.mark.parametrize(
    ("model", "most"), [("krea-2-turbo", 640), ("gemini-3.1-flash-lite-image", 2000)]
)
def test_a_limit_in_tokens_is_one_of_words(model: str, most: int) -> None:
    """Only the upstream can count tokens. Each word is at least one."""
    assert CATALOGUE.document(model)["fields"]["prompt"]["max"] == most
    for prompt in ("x" * 9000, "fog " * most, "fog\n\n " * (most - 1)):
        assert check(model, prompt=prompt) is None
    words = (f"{most} tokens", f"at least {most + 1}")
    refused("prompt", *words, model=model, prompt="fog " * (most + 1))


@pytest.mark.parametrize("n", [0, -1, 1001, 10**30, 4.0, "4", True, [4], {}])
@pytest.mark.parametrize("model", ["z-image-turbo", "mj-v7", "dall-e-9", None])
def test_n_has_a_limit_for_every_model(model: str, n: object) -> None:
    assert all(check(model, n=number) is None for number in (1, 999, 1000))
    refused("n", "1 to 1000", shown(n), model=model, n=n)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": "x" * 2345}, ("prompt", "2000", "2345")),
        ({"prompt": None}, ("prompt", "required", "2000")),
        ({"prompt": ["x"]}, ("prompt", '["x"]')),
        ({"negative_prompt": "x" * 501}, ("negative_prompt", "500", "501")),
        ({"size": "1441x1440"}, ("size", "589824", "2073600", "2075040")),
        ({"size": "2884x720"}, ("size", "1:4", "4:1", "2884x720")),
        ({"n": 5}, ("n", "1 to 4", "5")),
        ({"n": "2"}, ("n", "1 to 4", '"2"')),
        ({"prompt_extend": "yes"}, ("prompt_extend", "true or false", "yes")),
    ],
)
def test_a_refusal_names_the_field_the_limit_and_the_value(
    fields: dict[str, Any], words: tuple[str, ...]
) -> None:
    refused(*words, **fields)


def test_a_long_value_is_cut_in_the_message() -> None:
    violation = check(n=["x" * 100_000])
    assert violation is not None
    assert len(violation.message) < 200


@pytest.mark.parametrize(
    "size",
    ["1280", "1280X1280", "0x1280", "-1x1", " 1280x1280", "1280x1280\n", "١٢٨٠x1280", "1e3x1"],
)
def test_a_size_has_one_form(size: str) -> None:
    """WIDTHxHEIGHT, in whole numbers from 1."""
    refused("size", "WIDTHxHEIGHT", size=size)


def test_text_to_image_does_not_check_image_urls() -> None:
    """A field that the model does not document passes through, and is named as unknown."""
    assert check(image_urls="anything") is None
    body = {"model": TEXT, "prompt": "a", "promt": "b", "image_urls": "anything"}
    named = [warning.partition(" ")[0] for warning in CATALOGUE.warnings(TEXT, body)]
    assert named == ["promt", "image_urls"]


# --- what a model is


@pytest.mark.parametrize(
    ("model", "edits"),
    [(TEXT, False), (IMAGE, True), ("mj-v7", False), ("mj-v7-pan", True), ("gpt-image-2", True)],
)
def test_a_model_says_whether_it_edits(model: str, *, edits: bool) -> None:
    assert CATALOGUE.document(model)["edits"] is edits


@pytest.mark.parametrize(
    ("model", "forms"),
    [
        (TEXT, ["pixels"]),
        ("krea-2-turbo", ["ratios"]),
        ("gpt-image-2", ["names", "pixels", "ratios"]),
    ],
)
def test_a_model_says_which_forms_its_sizes_have(model: str, forms: list[str]) -> None:
    assert CATALOGUE.document(model)["sizes"]["forms"] == forms


# --- prices


@pytest.mark.parametrize(
    ("body", "credits", "price", "n", "per"),
    [
        ({"model": TEXT, "n": 3}, "6", "2", 3, "image"),
        ({"model": TEXT}, "2", "2", 1, "image"),
        ({"model": TEXT, "n": None}, "2", "2", 1, "image"),
        ({"model": "z-image-turbo"}, "0.026", "0.026", 1, "image"),
        ({"model": "z-image-turbo", "n": 3}, "0.078", "0.026", 3, "image"),
        ({"model": "krea-2-turbo"}, "0.05", "0.05", 1, "image"),
        ({"model": "gemini-3.1-flash-lite-image"}, "8.7", "8.7", 1, "image"),
        ({"model": "mj-v7"}, "5.4", "5.4", 1, "request"),
        ({"model": "mj-v7", "n": 4}, "5.4", "5.4", 1, "request"),
        ({"model": "mj-v7", "model_params": {"speed": "draft"}}, "2.7", "2.7", 1, "request"),
        ({"model": "mj-v7", "model_params": {"speed": "turbo"}}, "10.8", "10.8", 1, "request"),
        ({"model": "gpt-image-2-beta"}, "1.02", "1.02", 1, "image"),
        ({"model": "gpt-image-2-beta", "resolution": "4K"}, "2.652", "2.652", 1, "image"),
        ({"model": "gpt-image-2-beta", "size": "1360x1248"}, "1.02", "1.02", 1, "image"),
        ({"model": "gpt-image-2-beta", "size": "1376x1248"}, "1.734", "1.734", 1, "image"),
        ({"model": "gpt-image-2-beta", "size": "2112x2080"}, "1.734", "1.734", 1, "image"),
        ({"model": "gpt-image-2-beta", "size": "2128x2080"}, "2.652", "2.652", 1, "image"),
        (
            {"model": "gpt-image-2-beta", "size": "1:1", "resolution": "2K"},
            *("1.734", "1.734", 1, "image"),
        ),
        ({"model": "doubao-seedream-4.5", "n": 15}, "33.75", "2.25", 15, "image"),
    ],
)
def test_an_estimate_is_the_price_times_what_is_paid(
    body: dict[str, Any], credits: str, price: str, n: int, per: str
) -> None:
    """Prices are decimals in the file and whole millionths here."""
    cost = CATALOGUE.estimate(body)
    assert (cost.credits, cost.price) == (millionths(credits), millionths(price))
    assert (cost.n, cost.per) == (n, per)


@pytest.mark.parametrize("model", ["gpt-image-2", "dall-e-9"])
def test_an_estimate_without_a_price_is_unknown(model: str) -> None:
    cost = CATALOGUE.estimate({"model": model, "n": 3})
    assert (cost.credits, cost.price, cost.n) == (None, None, 3)
