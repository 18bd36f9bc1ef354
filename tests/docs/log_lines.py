"""Every log line: its name and its own fields. A test compares this list with the code."""

import re
from collections.abc import Mapping
from types import MappingProxyType

ALWAYS = ("timestamp", "level", "event", "service", "version")
WHERE_KNOWN = (
    *("request_id", "owner", "task_id", "upstream_id", "callback_id", "event_id"),
    *("delivery_id", "endpoint_id", "trace_id", "exception"),
)


def entries(text: str) -> Mapping[str, str]:
    """The texts by their names. A name begins its line, and further lines are indented."""
    lines = re.split(r"\n(?! )", text.strip())
    pairs = (" ".join(line.split()).partition(": ") for line in lines)
    return MappingProxyType({name: about for name, _, about in pairs})


LINES = entries(
    """
service.started: `role`, `address`, `settings` (secrets masked)
service.stopped: `role`, `unfinished` (jobs released at the stop)
traces.unavailable: `extra` (not installed). The OTEL_* variables ask for traces, and none are
    exported.
http.request: `method`, `route`, `status`, `duration_ms`, `bytes`
http.shed: `busy`, `waiting`, `callbacks` (in hand), `withheld` (requests shed since the last line).
    The client got 503.
http.failed: `method`, `route`, `exception`. A defect of the service. The client got 500.
auth.refused: `reason`, `hint` (the first characters, if the text looks like a key of this service)
console.signed_in: `owner`. A key signed in to the console.
admin.action: `action`, `subject`, `key_id` (null: a command in the store itself), `reason`,
    `outcome` (done, or why nothing changed), `detail`. The audit has the same entry.
input.uploaded: `input_id`, `bytes`, `kept` (false: it was erased meanwhile)
input.retried: `attempt`, `reason`, `code` (null: tried again), `wait_s`. An input image did not
    reach the upstream. Nothing was submitted.
file.stored: `file_id`, `media_type`, `bytes`, `sha256`. An input image.
file.erased: `file_id`. An input image, at its owner's request.
events.position_empty: `after`. A reader of the stream sent an empty `Last-Event-ID`, which counts
    as none.
task.queued: `model`, `replayed`, `prompt` (only with `LOG_PROMPTS`)
task.submitted: `attempt`, `estimated_time`, `state` (after the submission)
task.submission_retried: `attempt`, `reason`, `account`, `wait_s`. Nothing was created at the
    upstream.
task.submission_refused: `status`, `code`. The task is failed.
task.submission_uncertain: `reason`, `decide_s` (until `DARKROOM_UNCERTAIN` decides)
account.refused: `reason`, `setting`. The upstream refuses the service's key or account. Submissions
    wait until it accepts them again.
account.restored: `seconds` (since `account.refused`). Waiting submissions are sent.
upstream.unusable: `status` (null: no answer), `setting`. What answers is not the upstream's API.
upstream.called: `kind`, `status`, `outcome`, `duration_ms`, `upstream_request_id`
callback.received: `verdict`, `status`, `bytes`, `duration_ms` (since its arrival)
callback.refused: `reason`, `duration_ms`, `withheld` (wrong tokens since the last line, in a
    flood). Nothing was stored.
callback.overloaded: `refused` (since the last line, a second ago), `callbacks` (in hand). The
    upstream got 503 and retries.
task.confirmed: `status`, `results`
task.results_awaited: `status`, `results` (the number named so far). A completed task lacks links of
    results. The worker asks again for `DARKROOM_NO_RESULTS_AFTER_S`.
upstream.unreadable: `kind`, `reason`. A response could not be read, or has no documented status.
    Its beginning is in the task's timeline, where only administrators see it.
image.stored: `image_id`, `index`, `media_type`, `bytes`, `width`, `height`, `sha256`, `duration_ms`
image.retry: `image_id`, `index`, `reason`, `attempt`, `wait_s`, `quarantined` (the blob of a body
    that was no image)
image.lost: `image_id`, `index`, `reason`, `attempt`, `quarantined`
egress.refused: `purpose`, `host`, `reason`
task.erased: `images`
task.settled: `state`, `code`, `images`, `seconds` (since it was queued)
event.emitted: `type`, `sequence`, `deliveries`
delivery.attempted: `status`, `result`, `attempt` (0 for an attempt by hand), `duration_ms`,
    `error`, `wait_s`
delivery.exhausted: `attempt`
endpoint.disabled: `reason`
sink.published: `sink`, `events`, `sequence` (of the last event), `duration_ms`. The broker has
    confirmed them.
sink.failed: `sink`, `wait_s`, `exception`. The broker did not confirm. The service retries until it
    does, and logs this line once.
sink.restored: `sink`, `seconds` (since `sink.failed`)
sink.shortened: `sink`, `bytes`. The event was too large for the broker and was published without
    the request of its task.
sink.skipped: `sink`, `type`, `sequence`. The broker refused the event three times, for example
    because an exchange has no queue for its type. This sink does not get it.
sink.missed: `sink`, `after`, `until` (sequences). Retention removed these events while no process
    published to this sink.
secrets.rekeyed: `count` (secrets of endpoints and owners that are now encrypted under the first key
    of `DARKROOM_SECRET_KEY`)
secrets.unreadable: `count` (secrets that no key of `DARKROOM_SECRET_KEY` decrypts). Deliveries
    signed with them wait. Add the missing key.
reconcile.queried: `attempt`, `answer`, `wait_s`
store.damaged: `message`. The service writes nothing more to the file. Restore a backup.
store.waiting: `reason` (the server is starting, or another session holds a table that the migration
    needs), `limit_s` (how long the process keeps trying)
store.parameters_ignored: `parameters` (of `DARKROOM_DATABASE_URL`, comma-separated, that have no
    effect here)
store.unsafe: `setting` (off at the PostgreSQL server). The server may lose commits in a power cut.
store.freed: `session` (of a process that stalled inside a statement). Its locks are released.
store.failed: `message`, `exception`. The store did not commit or respond. The caller got 503.
blobs.failed: `message`, `exception`. The image store failed or lacks an image. The client got 503,
    or the sweep retries.
blobs.full: `purpose` (images or files), `free_bytes`, `limit_bytes` (`DARKROOM_MIN_FREE_BYTES`).
    The client got 503.
blobs.swept: `seen`, `removed` (images that no row names), `duration_ms`
retention.applied: `events`, `deliveries`, `tasks` (whose content was removed), `images`, `files`,
    `duration_ms`
worker.failed: `stage`, `key`, `attempt`, `wait_s`, `exception`
budget.refused: `model`, `period`, `needed`, `limit`, `spent`, `reserved`, `left`
ledger.entered: `entry_id`, `kind`, `credits`, `source`
task.parked: `stage`, `key` (of the row), `cause` (the number of faults or crashes), `advice` (what
    an operator does about it), `exception` (the last fault)
library.message: `logger`, `message`. A warning or error from a library.
"""
)
