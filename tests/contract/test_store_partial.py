"""Answers in part, in the store: what they name is kept, what they lack is asked for again, and
what cannot be read is kept for operators.
"""

from dataclasses import replace

from service.tasks import task_queries
from service.tasks.settlements import Settlement, record_settlements
from service.tasks.state import State
from service.upstreams.base import Report
from tests.contract.subject import DAY, HOUR, MINUTE, SECOND, Subject, completed, processing

URL, OTHER = "https://r.test/0", "https://r.test/1"
PATIENCE = 10 * MINUTE


async def answered(subject: Subject, task_id: str, report: Report | None, **more: object) -> int:
    """Records an answer and returns the milliseconds until the next query. 0: there is none."""
    lease = await subject.asking(task_id)
    requests = (await subject.task(task_id))["settle_requests"]
    settlement = Settlement(lease, report, requests, HOUR, DAY, patience_ms=PATIENCE)
    await subject.write(record_settlements, replace(settlement, **more))  # type: ignore[arg-type]
    due_at = (await subject.task(task_id))["settle_due_at"]
    return 0 if due_at is None else due_at - subject.clock.now


async def test_a_task_without_results_is_asked_for_ten_minutes(subject: Subject) -> None:
    """The waits grow from one second to a minute. Then the task fails."""
    task_id = await subject.submitted()
    waits: list[int] = []
    while wait := await answered(subject, task_id, completed(task_id)):
        waits.append(wait)
        task = await subject.task(task_id)
        assert (task["state"], task["upstream_status"]) == (State.SUBMITTED, "processing")
        subject.clock.shift(wait)
    assert waits[:6] == [SECOND, SECOND, 2 * SECOND, 4 * SECOND, 8 * SECOND, 16 * SECOND]
    assert (max(waits), sum(waits)) == (MINUTE, PATIENCE)
    assert (await subject.task(task_id))["error"]["code"] == "no_results"
    assert await subject.types(task_id) == ["image.task.submitted", "image.task.failed"]


async def test_results_are_kept_while_others_are_awaited(subject: Subject) -> None:
    """A later answer that lacks a known result takes nothing away, and the last one need not repeat
    it.
    """
    task_id = await subject.submitted()
    assert await answered(subject, task_id, completed(task_id, "", OTHER)) == SECOND
    assert await answered(subject, task_id, completed(task_id, URL, "")) == SECOND
    images = await subject.images(task_id)
    assert [(image["position"], image["source_url"]) for image in images] == [(0, URL), (1, OTHER)]
    subject.clock.shift(PATIENCE)
    assert await answered(subject, task_id, completed(task_id)) == 0
    assert (await subject.task(task_id))["state"] == State.STORING


async def test_a_query_comes_when_the_upstreams_time_is_up(subject: Subject) -> None:
    """Whatever the wait would be, and whatever the answer was. Then a task that has not ended is
    expired.
    """
    task_id = await subject.submitted()
    subject.clock.now = (await subject.task(task_id))["submitted_at"] + DAY - MINUTE
    report = processing(task_id)
    assert await answered(subject, task_id, report, expires_ms=DAY, latest_ms=DAY) == MINUTE
    assert await answered(subject, task_id, None, latest_ms=DAY) == HOUR  # no answer came
    unknown = Report(status=None)
    assert await answered(subject, task_id, unknown, expires_ms=DAY, latest_ms=DAY) == 0
    assert (await subject.task(task_id))["state"] == State.EXPIRED
    late = Settlement(
        await subject.requeued("settle", task_id), processing(task_id), 1, HOUR, DAY, DAY
    )
    await subject.write(record_settlements, late)
    assert (await subject.task(task_id))["settle_due_at"] is None


async def test_unreadable_answers_are_kept_for_operators(subject: Subject) -> None:
    """Equal ones once, and three of them. Every store keeps their bytes as text."""
    task_id = await subject.submitted()
    for raw in (b"<html>\0", b"<html>\0", b"\xff\xed\xa0\x80", b"a", b"b"):
        await answered(subject, task_id, None, raw=raw)

    async def kept(owner: str | None) -> list[object]:
        steps = await subject.store.read(task_queries.timeline, task_id, owner)
        return [each.get("raw") for each in steps if each["step"] == "upstream.unreadable"]

    assert await kept(None) == ["<html>\ufffd", "\ufffd\ufffd\ufffd\ufffd", "a"]
    assert await kept("somebody") == [None, None, None]
