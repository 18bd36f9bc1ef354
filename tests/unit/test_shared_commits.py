"""A confirmation waits a moment for its task's downloads, so that one commit records all."""

import asyncio

import pytest

from service.queue import shared_commits
from service.queue.shared_commits import SharedCommits


async def test_a_confirmation_goes_on_when_the_last_download_is_about_to_be_recorded() -> None:
    shared = SharedCommits()
    with shared.download("task_2"):
        with shared.download("task_1"):
            with shared.download("task_1"):
                joining = asyncio.ensure_future(shared.join("task_1"))
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not joining.done()
        await joining
        await shared.join("task_1")  # nothing is under way


async def test_a_confirmation_does_not_wait_for_a_slow_download(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared_commits, "LONGEST_S", 0.001)
    shared = SharedCommits()
    with shared.download("task_1"):
        await shared.join("task_1")
