"""The peers' requests to the upstream and to the receiver, for programs with threads or processes.
urllib3 costs the least CPU of the clients that block.
"""

import json

import urllib3
import work

POOL = urllib3.PoolManager(
    maxsize=32, retries=False, timeout=urllib3.Timeout(total=work.TIMEOUT_S), headers=work.KEY
)


class Problem(Exception):
    """An answer that is worth another try."""


def request(
    method: str, url: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> bytes:
    answer = POOL.request(method, url, body=body, headers={**work.KEY, **(headers or {})})
    if not 200 <= answer.status < 300:
        raise Problem(f"{answer.status} from {url}")
    return bytes(answer.data)


def submit(task_id: str, prompt: str) -> str:
    """Pays for a task. Returns the upstream's id."""
    body = json.dumps(work.submission(task_id, prompt)).encode()
    url, headers = f"{work.UPSTREAM}/v1/images/generations", {"content-type": "application/json"}
    return str(json.loads(request("POST", url, body, headers))["id"])


def fetch(task_id: str, upstream_id: str) -> tuple[str, list[str | None]]:
    """Confirms the end by a query and stores the pictures. Returns the status and checksums."""
    task = json.loads(request("GET", f"{work.UPSTREAM}/v1/tasks/{upstream_id}"))
    if task["status"] not in work.ENDED:
        raise Problem(f"{upstream_id} is {task['status']}")
    checksums = [work.save(task_id, request("GET", link)) for link in task["results"]]
    return task["status"], checksums


def deliver(task_id: str, upstream_id: str, end: tuple[str, list[str | None]]) -> None:
    headers, body = work.event(task_id, upstream_id, *end)
    request("POST", work.RECEIVER, body, headers)
