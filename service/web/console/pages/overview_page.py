"""Overview: what the operator looks at first. All figures stand in `GET /metrics` too."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, isnan

from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import Response

from service.web.console.visits import View, Visit

PREFIX = "darkroom_"
SHARES = (0.5, 0.95, 0.99)
TIMES = (
    ("callback_commit_seconds", "From a callback to its commit"),
    ("callback_to_event_seconds", "From a callback to the event"),
    ("callback_to_delivery_seconds", "From a callback to the delivery"),
    ("delivery_seconds", "Until a subscriber responded"),
)
AT_RISK_S = 3600  # a link that expires sooner is at risk


@dataclass(slots=True)
class Figures:
    """Samples of the metrics: by name, then by the labels' values."""

    samples: Mapping[str, dict[tuple[str, ...], float]] = field(
        default_factory=lambda: defaultdict(dict)
    )

    def one(self, name: str) -> float | None:
        """A metric without labels. None: it is unknown or has no value."""
        value = self.samples[name].get(())
        return value if value is not None and isfinite(value) else None

    def by(self, name: str, *, zeros: bool = False) -> list[tuple[str, float]]:
        """A metric with one label, the largest value first, without its zeros unless `zeros`."""
        values = self.samples[name].items()
        rows = [(labels[0], value) for labels, value in values if value or zeros]
        return sorted((row for row in rows if not isnan(row[1])), key=lambda row: -row[1])

    def total(self, name: str) -> float:
        return sum(self.samples[name].values())


def figures_of(text: str) -> tuple[Figures, Mapping[str, list[tuple[float, float]]]]:
    """The samples of a page of metrics, and the buckets of its histograms over all labels."""
    figures = Figures()
    buckets: dict[str, dict[float, float]] = defaultdict(lambda: defaultdict(float))
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels, name = dict(sample.labels), sample.name.removeprefix(PREFIX)
            if "le" in labels:
                buckets[name.removesuffix("_bucket")][float(labels["le"])] += sample.value
            else:
                figures.samples[name.removesuffix("_total")][tuple(labels.values())] = sample.value
    return figures, {name: sorted(counts.items()) for name, counts in buckets.items()}


def quantile(buckets: Sequence[tuple[float, float]], share: float) -> float | None:
    """Seconds, by interpolation in a bucket. None: nothing was counted, or it is above them all."""
    count = buckets[-1][1] if buckets else 0
    low, below = 0.0, 0.0
    for bound, cumulated in buckets:
        if count and cumulated >= share * count:
            if bound == inf:
                return None
            return low + (bound - low) * (share * count - below) / (cumulated - below or 1)
        low, below = bound, cumulated
    return None


async def overview(visit: Visit) -> Response:
    response = await visit.answer("GET /metrics")
    figures, buckets = figures_of(bytes(response.body).decode())
    ready = await visit.answer("GET /readyz")
    health = json.loads(bytes(ready.body))
    times = [
        (title, [quantile(buckets.get(name, ()), share) for share in SHARES], buckets.get(name))
        for name, title in TIMES
    ]
    return visit.render(
        "overview.html", figures=figures, health=health, times=times, at_risk_s=AT_RISK_S
    )


VIEWS = (View("GET /console/overview", overview, "admin", "Overview", "overview"),)
