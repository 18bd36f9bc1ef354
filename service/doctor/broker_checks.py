"""Checks of the brokers: whether they answer, keep what they confirm, and are up to date."""

import asyncio
from typing import Any

from service.backends import open_sinks
from service.doctor.patient import PROBE_S, Finding, Patient, fault, ok, told, warning
from service.errors import ConfigurationError
from service.events.broker_addresses import SinkAddress
from service.events.broker_worker import sinks_behind

LATE_MS = 60_000


async def check_brokers(patient: Patient) -> dict[str, Finding]:
    addresses = patient.settings.sinks
    try:
        sinks = open_sinks(patient.settings)
    except ConfigurationError as error:
        return {"brokers": fault(str(error), "correct DARKROOM_SINKS")}
    checks = {}
    for address, sink in zip(addresses, sinks, strict=True):
        try:
            await sink.open()
            checks[f"broker {sink.name}"] = await durability(address)
        except Exception as error:  # noqa: BLE001 - each library has a tree of its own
            mend = "start the broker, or correct DARKROOM_SINKS: address, user, password"
            checks[f"broker {sink.name}"] = fault(f"the broker cannot be used: {told(error)}", mend)
        finally:
            await sink.close()
    return checks | await lags(patient)


async def lags(patient: Patient) -> dict[str, Finding]:
    """Brokers that lack events for more than a minute."""
    store, types = patient.store, {each.name: each.types for each in patient.settings.sinks}
    if isinstance(store, Finding) or not types:
        return {}
    now, checks = store.clock(), {}
    for name, oldest in (await store.read(sinks_behind, types)).items():
        late = 0 if oldest is None else now - oldest
        key, mend = f"broker_lag {name}", "look for sink.failed in the log of the workers"
        text = f"its oldest event that is not confirmed is {late / 1000:.0f} s old"
        checks[key] = fault(text, mend) if late > LATE_MS else ok("the broker is up to date")
    return checks


async def durability(address: SinkAddress) -> Finding:
    """Whether the broker keeps what it confirms, as far as a client can see it."""
    async with asyncio.timeout(PROBE_S):
        if address.kind == "nats":
            return await jetstream(address)
        if address.kind == "redis":
            return await persistence(address)
    return ok("the broker answers")


async def jetstream(address: SinkAddress) -> Finding:
    import nats
    from nats.js.api import StorageType

    scheme = "tls" if address.tls else "nats"
    login: dict[str, Any] = {"user": address.user, "password": address.password}
    if address.password is None:
        login = {"token": address.user}
    servers = [f"{scheme}://{host}" for host in address.hosts]
    async with await nats.connect(servers, allow_reconnect=False, **login) as client:
        kept = (await client.jetstream().stream_info(address.target)).config
    if kept.storage == StorageType.MEMORY:
        text = f"the stream {address.target} is kept in memory: a restart loses its events"
        return fault(text, "make the stream anew with storage file")
    if (kept.num_replicas or 1) >= 3:
        return ok(f"the stream {address.target} is on disk with {kept.num_replicas} replicas")
    text = (
        f"the stream {address.target} has one copy, and the server does not tell a client whether"
        " it syncs before it confirms. By default it syncs every two minutes"
    )
    mend = "set jetstream { sync_interval: always } at the server, or use 3 replicas"
    return warning(text, mend)


async def persistence(address: SinkAddress) -> Finding:
    import redis.asyncio

    host, _, port = address.hosts[0].rpartition(":")
    client = redis.asyncio.Redis(
        host=host.strip("[]"),
        port=int(port),
        username=address.user or None,
        password=address.password,
        ssl=address.tls,
    )
    async with client:
        aof = (await client.info("persistence")).get("aof_enabled")
        saves = await config_of(client, "save")
        syncs = await config_of(client, "appendfsync")
    if not aof and saves in (None, ""):
        text = "this Redis keeps nothing on disk: a restart loses its events"
        return fault(text, "set appendonly yes and appendfsync always")
    if not aof or syncs in ("no", "everysec"):
        how = "snapshots alone" if not aof else f"appendfsync {syncs}"
        text = f"this Redis syncs with {how}: a power cut loses the last events"
        return warning(text, "set appendonly yes and appendfsync always")
    return ok("this Redis syncs what it confirms")


async def config_of(client: Any, name: str) -> str | None:
    """None: the user may not read it."""
    from redis.exceptions import RedisError

    try:
        value: str | None = (await client.config_get(name)).get(name)
    except RedisError:
        return None
    return value
