"""The documents and the charges of the sandbox's tasks."""

from dataclasses import replace
from decimal import Decimal

import pytest

from service.upstreams.base import Status
from service.upstreams.sandbox.checks import Order
from service.upstreams.sandbox.lifecycle import Ledger, document, number
from service.upstreams.sandbox.options import SandboxOptions

ORDER = Order("wan2.5-text-to-image", "a cat", 768, 768, 2, None)


def test_a_task_that_is_not_final_shows_only_progress() -> None:
    """Pending and processing tasks have no results, no error and no usage."""
    task = Ledger(SandboxOptions(), lambda: 5.5).create(
        ORDER, {}, "http://sandbox", "lot", None, ""
    )
    assert (document(task)["status"], document(task)["progress"]) == ("pending", 0)
    task.status = Status.PROCESSING
    assert document(task) == {
        "created": 5,
        "id": task.id,
        "model": "wan2.5-text-to-image",
        "object": "image.generation.task",
        "progress": 50,
        "status": "processing",
        "task_info": {"can_cancel": True},
        "type": "image",
    }


def test_a_price_per_request_is_paid_once_however_many_images_it_makes() -> None:
    """Fewer images than asked for cost the same, and none cost nothing."""
    order = replace(ORDER, n=4, per="request")
    for made, left in ((4, "8.5"), (1, "8.5"), (0, "10")):
        ledger = Ledger(SandboxOptions(credits=Decimal(10)), lambda: 5.5)
        task = ledger.create(order, {"images": made}, "http://sandbox", "lot", None, "")
        assert ledger.credits == Decimal("8.5")
        ledger.end(task)
        assert ledger.credits == Decimal(left)


@pytest.mark.parametrize(("credits", "shown"), [("3", 3), ("3.0", 3), ("8.7", 8.7), ("0.05", 0.05)])
def test_credits_are_decimal_numbers(credits: str, shown: float) -> None:
    """Whole numbers have no point, as at the upstream."""
    assert number(Decimal(credits)) == shown
    assert isinstance(number(Decimal(credits)), type(shown))


def test_the_options_do_not_print_the_key() -> None:
    assert "sk-secret" not in repr(SandboxOptions(api_key="sk-secret"))
