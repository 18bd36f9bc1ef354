"""Every limit of every model is tried below, at and above, on values made from the catalogue."""

import pytest

from service.upstreams.catalogue import load_catalogue
from service.upstreams.catalogue_fields import FieldRule, ImagesField
from service.upstreams.catalogue_images import COMMON, image_complaint
from tests.limits import IMAGE_LIMITS, bodies, edges, image_edges, set_limits, valued

CATALOGUE = load_catalogue()
FIELDS = {
    f"{model}-{name}": rule
    for model, entry in CATALOGUE.models.items()
    for name, rule in entry.fields.items()
}
RULES = {"common": COMMON} | {
    model: rule
    for model, entry in CATALOGUE.models.items()
    if isinstance(rule := entry.fields.get("image_urls"), ImagesField)
}


@pytest.mark.parametrize("model", CATALOGUE.models)
def test_a_limit_is_refused_beyond_and_accepted_at_it(model: str) -> None:
    """The refusal names the field, and a value of another size than the limit's."""
    tried = 0
    for name, limit, body, accepted in bodies(model, CATALOGUE.models[model]):
        violation = CATALOGUE.check(body)
        assert (violation is None) == accepted, (name, limit, valued(body, name))
        if violation is not None:
            assert violation.param == name
            assert violation.message.startswith(f"{name} "), violation.message
            tried += 1
    assert tried


def test_a_size_is_refused_with_its_pixels_and_its_aspect() -> None:
    body = {"model": "wan2.5-text-to-image", "prompt": "a", "size": "1540x384"}
    violation = CATALOGUE.check(body)
    assert violation is not None
    assert '"1540x384", which has 591360 pixels and an aspect of 4.01:1' in violation.message


@pytest.mark.parametrize("rule", FIELDS.values(), ids=FIELDS)
def test_every_limit_of_a_field_has_a_case(rule: FieldRule) -> None:
    """A limit that no other one already covers has an accepted and a refused value."""
    made = {edge.limit: edge for edge in edges(rule)}
    for limit in set_limits(rule) - {"required", "only_with"}:
        assert made[limit].refused, limit
        assert limit in ("type", "side") or made[limit].accepted, limit


@pytest.mark.parametrize("name", RULES)
def test_an_input_image_is_refused_beyond_a_limit_of_the_model(name: str) -> None:
    """The refusal has the measured value, and the limit."""
    rule, tried = RULES[name], set()
    for limit, figures, measured in image_edges(rule):
        complaint = image_complaint(rule, figures)
        assert (complaint is None) == (measured == ""), (limit, figures, complaint)
        if complaint is not None:
            assert measured in complaint
            wanted = getattr(rule, limit)
            assert limit in ("formats", "alpha") or str(wanted) in complaint, complaint
            tried.add(limit)
    has = {limit for limit in IMAGE_LIMITS if getattr(rule, limit) not in (None, True)}
    assert tried == has


@pytest.mark.parametrize("name", RULES)
def test_an_image_whose_figures_are_not_known_breaks_no_limit(name: str) -> None:
    """An old row has no figure of its alpha channel."""

    class Unknown:
        media_type = width = height = bytes = alpha = None

    assert image_complaint(RULES[name], Unknown()) is None


def test_a_model_without_limits_of_its_own_has_the_common_ones() -> None:
    assert CATALOGUE.image_rule("gpt-image-2").max_bytes == 50 << 20
    assert CATALOGUE.image_rule("doubao-seedream-4.0").min_side == 15
    for model in ("mj-v7", "krea-2-turbo", "dall-e-9", None, 7):
        assert CATALOGUE.image_rule(model) is COMMON
