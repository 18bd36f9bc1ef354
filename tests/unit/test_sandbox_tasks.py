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


def test_the_lot_of_a_submission_is_reproducible() -> None:
    """It depends on the seed, on the body without its callback URL, and on the number of equal
    bodies before it. A key keeps its lot until its task is forgotten.
    """
    now = [0.0]
    ledger = Ledger(SandboxOptions(seed=1, task_ttl_s=60), lambda: now[0])
    lots = [
        ledger.seed(None, {"prompt": prompt, "callback_url": prompt + url})
        for url in "xy"
        for prompt in "ab"
    ]
    again = Ledger(SandboxOptions(seed=1), lambda: now[0])
    assert lots == [
        again.seed(None, {"prompt": "a"}),
        again.seed(None, {"prompt": "b"}),
        again.seed("k", {"prompt": "a"}),
        again.seed("l", {"prompt": "b"}),
    ]
    assert len(set(lots)) == 4
    kept = ledger.seed("key", {"prompt": "a"})
    ledger.create(ORDER, {}, "http://sandbox", kept, "key", "")
    assert ledger.seed("key", {"prompt": "a"}) == kept
    now[0] = 60
    assert ledger.all() == []
    assert ledger.seed("key", {"prompt": "a"}) != kept


@pytest.mark.parametrize(("credits", "shown"), [("3", 3), ("3.0", 3), ("8.7", 8.7), ("0.05", 0.05)])
def test_credits_are_decimal_numbers(credits: str, shown: float) -> None:
    """Whole numbers have no point, as at the upstream."""
    assert number(Decimal(credits)) == shown
    assert isinstance(number(Decimal(credits)), type(shown))


def test_the_options_do_not_print_the_key() -> None:
    assert "sk-secret" not in repr(SandboxOptions(api_key="sk-secret"))
