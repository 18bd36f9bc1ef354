"""Events for a command that follows them while the service comes and goes."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from service.cli.api_client import ApiClient, ServiceBusy, ServiceUnreachable
from service.cli.output import remark
from service.errors import EgressError
from service.strict_json import JSON

MAX_FAILURES = 8


def event_pages(
    client: ApiClient,
    query: Mapping[str, Any],
    last: str,
    asks_again: Callable[[str], bool] = lambda _: True,
) -> Iterator[list[JSON]]:
    """Pages of events after the sequence `last`, without end. After a failure the command asks
    again, up to 8 times in a row, if `asks_again` agrees for the last sequence.
    """
    failures = 0
    while True:
        try:
            page = client.call("GET", "/v1/events", params={**query, "after": last})
            failures = 0
        except (ServiceUnreachable, ServiceBusy, EgressError):
            failures += 1
            if not asks_again(last) or failures == MAX_FAILURES:
                raise
            time.sleep(2 ** (failures - 1))
            continue
        if page["resync"]:
            remark(f"events after {last} are no longer all kept")
        last = page["next_after"]
        yield page["data"]
