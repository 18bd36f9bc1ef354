"""The limits of the catalogue's two models. Each refusal names its limit in the message."""

import pytest

from service.upstreams.catalogue import Violation, load_catalogue

CATALOGUE = load_catalogue()
TEXT, IMAGE = "wan2.5-text-to-image", "wan2.5-image-to-image"
LINKS = ["https://example.com/1.png"]


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
    assert all(word in violation.message for word in words), violation.message


def test_the_catalogue_has_the_two_models_with_prices() -> None:
    """The catalogue is data in the package."""
    assert {name: limits.price for name, limits in CATALOGUE.models.items()} == {TEXT: 2, IMAGE: 2}


@pytest.mark.parametrize("model", [TEXT, IMAGE])
def test_the_defaults_of_a_model_are_within_its_limits(model: str) -> None:
    assert check(model) is None
    assert (
        check(
            model,
            size=CATALOGUE.models[model].size_default,
            n=1,
            negative_prompt="",
            prompt_extend=True,
            seed=7,
        )
        is None
    )


@pytest.mark.parametrize("model", ["z-image-turbo", None, 7, ["wan2.5-text-to-image"], {}])
def test_a_model_that_is_not_in_the_catalogue_passes_through(model: object) -> None:
    """The upstream checks the fields of other models."""
    assert CATALOGUE.check({"model": model, "prompt": 7, "n": -1, "size": "auto"}) is None
    assert CATALOGUE.check({}) is None


def test_a_null_field_counts_as_absent() -> None:
    """Clients write null for a field that they leave to the upstream."""
    assert check(size=None, n=None, negative_prompt=None, image_urls=None) is None


@pytest.mark.parametrize("prompt", ["x", "x" * 2000, "雪" * 2000, "\U0001f4a5" * 2000])
def test_a_prompt_is_counted_in_characters(prompt: str) -> None:
    """It is not counted in bytes or in UTF-16 units."""
    assert check(prompt=prompt) is None


@pytest.mark.parametrize("prompt", [None, "", "x" * 2001, 7, ["x"], True])
def test_a_prompt_is_a_text_within_its_limit(prompt: object) -> None:
    """A missing, empty, too long or non-text prompt is refused."""
    refused("prompt", "2000", prompt=prompt)


def test_the_refusal_of_a_long_prompt_names_its_length() -> None:
    refused("prompt", "2000", "2345", prompt="x" * 2345)
    refused("negative_prompt", "500", "501", negative_prompt="x" * 501)


@pytest.mark.parametrize("prompt", ["x" * 501, 7, ["x"], False])
def test_a_negative_prompt_is_a_text_within_its_limit(prompt: object) -> None:
    """The limit is 500 characters."""
    assert check(negative_prompt="x" * 500) is None
    refused("negative_prompt", "500", negative_prompt=prompt)


@pytest.mark.parametrize(
    "size", ["768x768", "1440x1440", "1280x1280", "2880x720", "720x2880", "1536x384", "384x1536"]
)
def test_sizes_within_the_limits_pass(size: str) -> None:
    """The limits of total and aspect ratio are inclusive."""
    assert check(size=size) is None


@pytest.mark.parametrize("size", ["1441x1440", "767x768", "1x1", "999999x999999"])
def test_the_total_of_pixels_has_limits(size: str) -> None:
    """It is 768 × 768 to 1440 × 1440 pixels."""
    refused("size", "589824", "2073600", size=size)


@pytest.mark.parametrize("size", ["2884x700", "700x2884", "1540x384"])
def test_the_aspect_ratio_has_limits(size: str) -> None:
    """It is 1:4 to 4:1."""
    refused("size", "0.25", "4", size=size)


@pytest.mark.parametrize(
    "size",
    [
        "axb",
        "1280",
        "1280X1280",
        "1280*1280",
        "0x1280",
        "1280x0",
        "-1x1",
        " 1280x1280",
        "1280x1280\n",
        "١٢٨٠x1280",
        "",
        "1e3x1e3",
    ],
)
def test_a_size_has_one_form(size: str) -> None:
    """WIDTHxHEIGHT, in whole numbers from 1."""
    refused("size", "WIDTHxHEIGHT", "1280x1280", size=size)


@pytest.mark.parametrize("size", [1280, [1280, 1280], {"width": 1280}, True])
def test_a_size_is_a_text(size: object) -> None:
    """The refusal of another type names the form."""
    refused("size", "WIDTHxHEIGHT", size=size)


def test_image_to_image_has_a_smaller_limit() -> None:
    """It is 1280 × 1280 pixels."""
    assert check(IMAGE, size="1280x1280") is None
    refused("size", "1638400", model=IMAGE, size="1440x1440")


@pytest.mark.parametrize("n", [0, 5, -1, True, 1.0, 2.5, "2", [1]])
def test_n_is_a_whole_number_from_1_to_4(n: object) -> None:
    """The upstream charges for `n` images in advance."""
    assert all(check(n=number) is None for number in (1, 2, 3, 4))
    refused("n", "1 to 4", n=n)


@pytest.mark.parametrize(
    "urls", [None, [], LINKS * 6, "https://example.com/1.png", [7], [""], [None], {"url": LINKS[0]}]
)
def test_image_to_image_takes_one_to_five_input_images(urls: object) -> None:
    """One page of the upstream says two and another says five. The larger number is the limit."""
    assert all(check(IMAGE, image_urls=LINKS * count) is None for count in range(1, 6))
    refused("image_urls", "1 to 5", model=IMAGE, image_urls=urls)


def test_text_to_image_does_not_check_image_urls() -> None:
    """Unknown fields pass through."""
    assert check(image_urls="anything") is None
