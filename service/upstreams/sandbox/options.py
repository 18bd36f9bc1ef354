"""The options of a sandbox."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from ipaddress import IPv4Network, IPv6Network
from typing import Any

from service.upstreams.catalogue import Catalogue, load_catalogue


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxOptions:
    """The defaults are the documented ones, except that a task takes 60 s upstream.

    `base_url` is the address in result links, by default the one of the submission. Without
    `api_key` any Bearer key is valid. `fetch_inputs`: a submission is refused if one of its input
    images cannot be fetched. `catalogue` has the models and their limits. Callbacks go to
    public https addresses and into `networks`. Times are seconds. `price` is the credits for an
    image, or for a request of a model that has a price per request, in place of the catalogue's
    price. `faults` are the defaults of every request's `sandbox` object (see `faults.FAULTS`). A
    fault in `shares` meets that share of the tasks, 0 to 1. With a `seed` the same requests get the
    same ids, faults and files, in any order.
    """

    base_url: str | None = None
    catalogue: Catalogue = field(default_factory=load_catalogue, repr=False)
    api_key: str | None = field(default=None, repr=False)
    networks: tuple[IPv4Network | IPv6Network, ...] = ()
    delay_s: float = 1.0
    task_ttl_s: float = 86400
    result_ttl_s: float = 86400
    file_ttl_s: float = 259200
    price: Decimal | None = None
    credits: Decimal = Decimal(10000)
    seed: int | None = None
    faults: Mapping[str, Any] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    fetch_inputs: bool = True
    callback_timeout_s: float = 10
    callback_delays_s: tuple[float, ...] = (1, 2, 4)
