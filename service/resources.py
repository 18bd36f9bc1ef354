"""What the steps of the pipeline work with. `app.open_resources` makes it; here are only names and
types.
"""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from service import model
from service.blobs import Blobs
from service.egress import Egress
from service.ops.metrics import Metrics
from service.signing import Keyring
from service.sinks import Webhooks
from service.store import Store
from service.upstreams import Upstream
from service.upstreams.pace import Pace


def new_id(kind: str, now: int) -> str:
    """An id with this process's randomness."""
    return model.make_id(kind, now, os.urandom(10))


@dataclass(frozen=True, slots=True)
class Resources:
    """One process's connections to the world outside."""

    store: Store
    blobs: Blobs
    upstream: Upstream
    pace: Pace  # every call to the upstream has a place there
    results: Egress  # fetches what the upstream made
    webhooks: Webhooks  # to endpoints
    task_callbacks: Webhooks  # to tasks' own callback_url
    keyring: Keyring
    metrics: Metrics
    links: model.Links
    clock: Callable[[], int]  # milliseconds since 1970 UTC
    new_id: Callable[[str, int], str] = new_id
    random: Callable[[], float] = field(default=random.random)

    def id(self, kind: str) -> str:
        return self.new_id(kind, self.clock())
