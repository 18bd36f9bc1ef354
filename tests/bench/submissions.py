"""What a submission costs: `python -m tests.bench.submissions`.

With `Prefer: respond-async`, the submissions a second that `darkroom serve` commits and answers,
compared with a bare route that stores nothing. Without it, the latency that Darkroom adds to the
upstream's answer. The upstream answers at once and never calls back.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

from tests.bench.acknowledgement import FULL, QUICK, Scale
from tests.bench.processes import MEASURED, MEASURING, measure, server
from tests.bench.program import run, spread
from tests.processes import ADMIN_KEY, service_settings

UPSTREAM = ("tests.bench.peers.upstream", "held", "0")
BARE = ("tests.bench.servers", "bare-submissions")
COMMITTED, TAKEN = '"status":"pending"', 'id":"task-unified-'  # in the answers that are a success
CALLS = ("16", "128")  # concurrent ones to the upstream, first by default
ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
Run = Mapping[str, float]
FLOOD = {
    "bare": "bare route: the JSON is read, nothing is kept",
    CALLS[0]: "`darkroom serve`, answered once the task is durable",
    CALLS[1]: f"the same with `DARKROOM_EVOLINK_CONCURRENCY={CALLS[1]}`",
}
ALONE = {
    "direct": "to the upstream itself",
    "through": "through `darkroom serve`, answered once the upstream has accepted",
    "added": "what Darkroom adds",
}


def submissions(path: Path, count: int, headers: Mapping[str, str], **more: str) -> Path:
    """Writes so many requests for the load, each with its own prompt."""
    body, lines = {"model": "wan2.5-text-to-image", "size": "1024x1024", **more}, []
    for number in range(count):
        text = json.dumps({**body, "prompt": f"a lighthouse, {path.name} {number}"})
        lines.append({"path": "/v1/images/generations", "body": text, "headers": headers})
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def made_key(service: str) -> dict[str, str]:
    """The header of a client's own key, which is looked up in the store unlike the admin's."""
    body = {"owner": "shop", "scopes": ["submit"]}
    answer = httpx.post(f"{service}/v1/keys", json=body, headers=ADMIN, trust_env=False)
    return {"authorization": f"Bearer {answer.raise_for_status().json()['key']}"}


def ordered(upstream: str) -> int:
    """How many submissions the upstream has taken."""
    return int(httpx.get(f"{upstream}/bench/counts", trust_env=False).json()["orders"])


def flooded(service: str, key: Mapping[str, str], upstream: str, path: Path, scale: Scale) -> Run:
    """One run over all connections. `sent` is how many tasks a second reach the upstream in it."""
    requests = submissions(path, scale.tasks, {**key, "prefer": "respond-async"})
    before, load = ordered(upstream), (scale.connections, scale.warm_up, scale.seconds)
    run = measure(service, requests, "again" if path.name == "bare" else "once", *load, COMMITTED)
    return {**run, "sent": (ordered(upstream) - before) / (time.monotonic() - run["started"])}


def one_round(folder: Path, scale: Scale) -> dict[str, Run]:
    """Measures each row once, one after another, with fresh processes."""
    runs: dict[str, Run] = {}
    count, load = scale.tasks, ("again", 1, scale.warm_up, scale.seconds, TAKEN)
    with server(*UPSTREAM, folder=folder, cores=MEASURING) as upstream:
        requests = submissions(folder / "direct", count, {}, callback_url=f"{upstream}/none")
        runs["direct"] = direct = measure(upstream, requests, *load)
        for calls in CALLS:
            more = {"EVOLINK_CONCURRENCY": calls, "DATA_DIR": str(folder / f"data-{calls}")}
            settings = service_settings(upstream, folder, **more)
            with server("service", "serve", folder=folder, cores=MEASURED, **settings) as service:
                key = made_key(service)
                if calls == CALLS[0]:
                    requests = submissions(folder / "through", count, key)
                    runs["through"] = measure(service, requests, *load)
                runs[calls] = flooded(service, key, upstream, folder / calls, scale)
        with server(*BARE, folder=folder, cores=MEASURED) as address:
            runs["bare"] = flooded(address, ADMIN, upstream, folder / "bare", scale)
    runs["added"] = {part: runs["through"][part] - direct[part] for part in ("p50", "p99")}
    return runs


def latencies(runs: Sequence[Run], form: str) -> list[str]:
    return [spread([run[part] * 1000 for run in runs], form) for part in ("p50", "p99")]


def table(rounds: Sequence[Mapping[str, Run]], connections: int) -> str:
    columns = "a second | p50 ms | p99 ms | of bare | meanwhile to the upstream, a second"
    lines = [f"| submissions over {connections} connections | {columns} |", f"|{'---|' * 6}"]
    for name, about in FLOOD.items():
        runs = [each[name] for each in rounds]
        rate, sent = (spread([run[part] for run in runs], ".0f") for part in ("rate", "sent"))
        share = spread([each[name]["rate"] / each["bare"]["rate"] for each in rounds], ".2f")
        lines.append(f"| {about} | {' | '.join((rate, *latencies(runs, '.1f'), share, sent))} |")
    lines += ["", "| one submission after the other | p50 ms | p99 ms |", "|---|---|---|"]
    for name, about in ALONE.items():
        figures = latencies([each[name] for each in rounds], ".2f")
        lines.append(f"| {about} | {' | '.join(figures)} |")
    return "\n".join(lines)


def submissions_and_latencies(folder: Path, rounds: int, quick: bool) -> str:
    scale, runs = QUICK if quick else FULL, []
    for number in range(rounds):
        (place := folder / str(number)).mkdir()
        runs.append(one_round(place, scale))
    return table(runs, scale.connections)


if __name__ == "__main__":
    run("python -m tests.bench.submissions", "submissions", submissions_and_latencies)
