"""Results that are no links: `data:` URLs with the image inside the upstream's answer."""

from service.images.downloads import Lost, Retry
from service.resources import Resources
from service.tasks import task_queries
from service.tasks.rows import ImageRow
from service.upstreams.base import NoAnswer


async def inline_result(
    resources: Resources, row: ImageRow, max_bytes: int
) -> bytes | Retry | Lost:
    """The image of a row that keeps only the hash of its `data:` URL. The upstream is asked for its
    answer again, so that the store need not hold images.
    """
    task = await resources.store.read(task_queries.task_row, row.task_id, None)
    if task is None or task.upstream_id is None:
        return Retry("the task has no id at the upstream")
    async with resources.limiter.slot("confirm"):
        upstream = resources.upstreams[task.upstream]
        try:
            content = await upstream.inline_result(task.upstream_id, row.source_url)
        except ValueError as error:
            return Retry(str(error), stale=True)
    if content is None:
        return Retry("the upstream has other results now", stale=True)
    if isinstance(content, NoAnswer):
        return Retry(content.reason, round((content.retry_after or 0) * 1000))
    return Lost(f"over {max_bytes} bytes") if len(content) > max_bytes else content
