"""The operator's file: what it may change, and the errors that name file, line and field."""

import json
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]  # it has no types
import pytest

from service.errors import ConfigurationError
from service.upstreams.catalogue import Catalogue, load_catalogue
from service.upstreams.catalogue_entry import catalogue_schema
from tests.environment import ROOT

TEXT = "wan2.5-text-to-image"
BODY = {"model": TEXT, "prompt": "a cat"}


def loaded(folder: Path, text: str) -> Catalogue:
    path = folder / "models.toml"
    path.write_text(text, "utf-8")
    return load_catalogue(path)


def test_a_file_overrides_one_part_of_a_model(tmp_path: Path) -> None:
    """The other parts stay as they are. A part without a source names the file's setting."""
    catalogue = loaded(
        tmp_path,
        """
        [models."wan2.5-text-to-image".price]
        credits = 0.7

        [models."wan2.5-text-to-image".fields]
        n = { type = "integer", min = 1, max = 2, source = "our contract" }
        """,
    )
    assert catalogue.estimate(BODY | {"n": 2}).credits == 1_400_000
    assert catalogue.check(BODY | {"n": 2}) is None
    assert catalogue.check(BODY | {"n": 3}) is not None
    assert catalogue.check(BODY | {"size": "1x1"}) is not None
    document = catalogue.document(TEXT)
    assert document["price"]["source"] == "DARKROOM_CATALOGUE"
    assert document["fields"]["n"]["source"] == "our contract"
    assert document["fields"]["size"]["source"] == document["source"]
    assert load_catalogue().estimate(BODY).credits == 2_000_000


def test_a_file_adds_a_model(tmp_path: Path) -> None:
    """`like` takes the fields of another model, also of one that the file adds."""
    catalogue = loaded(
        tmp_path,
        """
        [models.painter]
        like = "z-image-turbo"
        price = { credits = 3, per = "request" }
        [models.painter.fields]
        negative_prompt = { type = "string", max = 9 }
        [models.sprayer]
        like = "painter"
        """,
    )
    assert len(catalogue.models) == len(load_catalogue().models) + 2
    body = {"model": "sprayer", "prompt": "a"}
    assert catalogue.check(body | {"size": "16:9", "negative_prompt": "x" * 9}) is None
    assert catalogue.check(body | {"negative_prompt": "x" * 10}) is not None
    assert catalogue.check(body | {"size": "17:9"}) is not None
    assert catalogue.estimate(body).credits is None
    assert catalogue.estimate({"model": "painter", "n": 3}).credits == 3_000_000
    assert catalogue.document("painter")["source"] == "DARKROOM_CATALOGUE"


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert loaded(tmp_path, "").models == load_catalogue().models


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('[models.a]\nsource = "x', 2, ()),
        ("[models.a\n", 1, ()),
        ("[models.a]\n\n[models.a]\n", 3, ()),
        ("x = 1\n", 1, ("x",)),
        ("[models.a]\n# a note\ncolour = 1\n", 3, ("models.a.colour",)),
        ('[models."a b"]\n', 1, ("a b",)),
        ("[models.a]\nedits = 1\n", 2, ("models.a.edits", "not 1")),
        (
            "[models.a]\n[models.a.price]\nper = 'image'\n",
            2,
            ("models.a.price.credits", "required"),
        ),
        ("[models.a]\nprice = { credits = -1 }\n", 2, ("models.a.price.credits", "0", "-1")),
        ("[models.a.price]\n\ncredits = 0.0000001\n", 3, ("credits", "6 decimal places")),
        ("[models.a.price]\ncredits = 1\nper = 'hour'\n", 3, ("models.a.price.per", "hour")),
        ("[models.a.fields]\nn = { type = 'integer', max = 'x' }\n", 2, ("models.a.fields.n.max",)),
        (
            "[models.a.fields]\np = { type='string' }\nn = { type = 'colour' }\n",
            3,
            ("fields.n", "colour"),
        ),
        ("[models.a.fields]\nn = { min = 1 }\n", 2, ("models.a.fields.n: type is required",)),
        ("[models.a.fields]\nn = { type = 'integer', pixels = [1, 2] }\n", 2, ("n.pixels",)),
        (
            "[models.a.fields]\nn = { type = 'integer', max = 4, default = 5 }\n",
            2,
            ("models.a.fields.n", "default", "4", "5"),
        ),
        ("[models.a]\nfields.size = { type = 'size', pixels = [1, 2, 3] }\n", 2, ("size.pixels",)),
        ("models.a.fields.n = { type = 'integer', max = true }\n", 1, ("n.max",)),
        ("[models.b]\n[models.a]\nlike = 'c'\n", 3, ("models.a.like", "'c'")),
        (
            "[models.a.fields]\nn = { type = 'integer', min = 5, max = 4 }\n",
            2,
            ("models.a.fields.n: min and max: 5 is more than 4",),
        ),
        (
            "[models.a.fields.size]\ntype = 'size'\nside = [9, 8]\n",
            1,
            ("models.a.fields.size", "side: 9 is more than 8"),
        ),
        (
            "[models.a.fields]\nimage_urls = { type = 'images', formats = ['jpg'] }\n",
            2,
            ("models.a.fields.image_urls.formats", "jpg", "jpeg"),
        ),
        ("[models.a.fields]\nn = { type = 'integer', values = [] }\n", 2, ("n.values", "1 item")),
        ("[models.a.price]\ncredits = 1\nby = 'n'\n", 1, ("models.a.price", "by and values")),
        ("[models.a.price]\ncredits = 1\npixels = { 0 = 'x' }\n", 1, ("price", "has no x")),
        ("[models.a.price]\ncredits = 1\npixels = { x = 'x' }\n", 3, ("price.pixels.x",)),
        (
            "[models.a]\n[models.a.price]\ncredits = 1\nby = 'm'\nvalues = { x = 1 }\n",
            4,
            ("models.a.price.by", "'m'"),
        ),
        (
            "[models.a.fields]\nsize = { type = 'size', only_with = { m = 1 } }\n",
            2,
            ("models.a.fields.size.only_with.m", "'m'"),
        ),
        ("[models.a]\nlike = 'b'\n[models.b]\n", 2, ("models.a.like", "'b'")),
    ],
)
def test_a_mistake_is_named_with_file_line_and_field(
    tmp_path: Path, text: str, line: int, words: tuple[str, ...]
) -> None:
    """One line of text says where the operator has to look."""
    with pytest.raises(ConfigurationError) as refusal:
        loaded(tmp_path, text)
    message = str(refusal.value)
    assert message.startswith(f"DARKROOM_CATALOGUE: {tmp_path}/models.toml, line {line}: ")
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing.toml"
    with pytest.raises(ConfigurationError, match=r"DARKROOM_CATALOGUE: \S+missing.toml: No such"):
        load_catalogue(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigurationError, match="UTF-8"):
        load_catalogue(path)


def test_the_schema_of_the_file_is_in_the_repository() -> None:
    """`python -m tests.docs.render` writes it."""
    assert json.loads((ROOT / "docs/catalogue.schema.json").read_text()) == catalogue_schema()


@pytest.mark.parametrize(
    ("document", "valid"),
    [
        ({}, True),
        ({"models": {"a": {}}}, True),
        ({"models": {"a": {"price": {"credits": 1.5}}}}, True),
        ({"models": {"a": {"fields": {"n": {"type": "integer", "max": 4}}}}}, True),
        ({"models": {"a": {"fields": {"n": {"type": "unsupported"}}}}}, True),
        ({"models": {"a": {"colour": 1}}}, False),
        ({"models": {"a b": {}}}, False),
        ({"models": {"a": {"price": {}}}}, False),
        ({"models": {"a": {"fields": {"n": {"max": 4}}}}}, False),
        ({"models": {"a": {"fields": {"n": {"type": "integer", "max": "4"}}}}}, False),
        ({"models": {"a": {"fields": {"n": {"type": "boolean", "max": 4}}}}}, False),
    ],
)
def test_the_schema_accepts_what_the_service_accepts(
    document: dict[str, object], *, valid: bool
) -> None:
    """An editor that knows the schema shows the same mistakes."""
    assert jsonschema.Draft202012Validator(catalogue_schema()).is_valid(document) is valid
