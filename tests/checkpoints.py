"""The checkpoints of each step with the effect of a kill there, for the crash tests and for the
table of docs/reliability.md.
"""

from tests.docs.log_lines import entries

CHECKPOINTS = entries(
    """
submit.checked: The client gets no response and nothing is stored. The client submits again and gets
    a new task.
submit.inserted: The client gets no response, but the task goes on. The same `Idempotency-Key`
    returns it.
submission.claimed: Nothing was sent. The next worker sends the submission.
submission.started: Nothing was sent, but the store cannot tell. The task is `uncertain`, is not
    sent again, and fails with `submission_uncertain`.
submission.answered: The upstream's response is lost. The task is `uncertain` and is not sent again.
    The callback proves it, and the task goes on.
submission.recorded: The submission is not sent again. The task goes on with its callback or a
    query.
account.held: The waiting submissions become due after their wait. Any living worker tries them.
account.restored: The waiting submissions become due after their wait.
inbox.received: The upstream gets no 200 and sends the callback again. If it stops, a query finds
    the outcome.
inbox.committed: The upstream gets no 200 and sends the callback again, which is a `duplicate`. The
    first one waits in the inbox, and the next worker judges it.
inbox.waiting: The callback was accepted and has no verdict yet. The next worker judges it, and the
    upstream need not send it again.
settle.claimed: The next worker queries the upstream.
settle.answered: The next worker queries the upstream again. A query is free and changes nothing.
settle.recorded: The downloads or the terminal event are committed and go on.
download.fetched: The next worker downloads the image again. A later start removes the temporary
    file.
download.saved: The next worker downloads the image again and finds it stored under the same name.
download.recorded: The stored image stays. The other images are downloaded. The terminal event,
    committed with the last image, is delivered.
delivery.claimed: The next worker sends the event.
delivery.answered: The next worker sends the event again under the same `webhook-id`.
delivery.recorded: The event is not sent again.
erase.committed: The task's content is gone from every response. The sweep removes the image files
    within about a day.
"""
)

# Of input images. tests/crash/test_input_kills.py kills processes there.
INPUT_CHECKPOINTS = entries(
    """
file.begun: The client gets no response and uploads again. The row of the first upload names no
    blob, is never shown, and goes when its days are over.
file.saved: As above. The sweep removes the blob of the first upload within about a day.
file.stored: The client gets no response and uploads again. Both files are in the list and go when
    their days are over.
input.started: Nothing was sent. The next worker uploads the image and submits the task.
input.uploaded: The upstream keeps a copy that no row names, for 72 hours. The next worker uploads
    the image again under another name and submits the task.
input.recorded: Nothing was sent. The next worker submits the task with the same copy. If the copy
    expires before that, the next worker makes another one.
input.forgotten: The account has no room for another file. The upstream keeps a copy that no row
    names, for 72 hours, and the next worker deletes others.
file.erased: The file is gone from every response. A task that waits with it fails without a
    submission. The sweep removes the blob within about a day.
"""
)
