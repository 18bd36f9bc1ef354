"""What a line for people shows of a document."""

from collections.abc import Sequence
from datetime import UTC, datetime

from service.cli.output import plain
from service.strict_json import JSON


def task_row(task: JSON) -> JSON:
    """`cost`: the credits used, or else those reserved, in brackets."""
    used, reserved = (task["usage"][f"credits_{name}"] for name in ("used", "reserved"))
    cost = used if used is not None or reserved is None else f"({reserved})"
    shown = {
        "created": date(task["created"]),
        "age": age_of(task["created"]),
        "cost": cost,
        "images": len(task["images"]),
        "prompt": plain(task["prompt"] or "")[:60],
    }
    return task | shown


def age_of(created: int) -> str:
    return age(datetime.now(UTC).timestamp() - created)


def age(seconds: float) -> str:
    """The two largest units: 4s, 3m 20s, 5h 12m, 12d 4h."""
    words: list[str] = []
    left = max(0, int(seconds))
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (words and len(words) < 2):
            words.append(f"{count}{unit}")
    return " ".join(words[:2]) or "0s"


def endpoint_row(endpoint: JSON) -> JSON:
    rate = endpoint["success_rate"]
    types = ",".join(endpoint["types"])
    shown = {"since": endpoint["status_since"], "types": types, "owner": endpoint["owner"] or "*"}
    return endpoint | shown | {"success": None if rate is None else f"{rate:.1%}"}


def with_missed(endpoint: JSON) -> JSON:
    """The events that an endpoint missed while it was disabled, and the command that sends them."""
    replay = endpoint["replay"]
    if not replay or not replay["count"]:
        return endpoint | {"replay": None}
    command = f"darkroom replay start {endpoint['id']} --since {replay['since']}"
    return endpoint | {"replay": None, "missed": replay["count"], "to send them": command}


def delivery_row(delivery: JSON) -> JSON:
    attempts = delivery["attempts"]
    error = (attempts[-1]["error"] if attempts else None) or delivery["cause"]
    shown = {"attempts": len(attempts), "next_attempt": delivery["next_attempt_at"]}
    return delivery | shown | {"last_error": error}


def date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def why_held(steps: Sequence[JSON]) -> str | None:
    """The last step of an image that is not saved, or else the last step of the task."""
    for step in {step.get("image_id"): step for step in steps}.values():
        if step["step"] == "image.retry":
            return f"image {step['index']} is not saved yet: {step['reason']}"
    last = steps[-1] if steps else {}
    reason: str | None = last.get("message") or last.get("reason")
    retried = last.get("step") == "task.submission_retried"
    return f"the upstream took no submission yet: {reason}" if retried else reason
