"""Everything Darkroom raises on purpose, in one tree. Lower errors are translated once, where they
enter.

    DarkroomError
    ├── ConfigurationError     a setting, a schema or a lock is wrong: one line, then exit
    ├── ApiError               an answer to a client: status, code, message, param
    ├── StoreUnavailable       the store did not commit, or not in time: nothing was promised
    ├── BlobUnavailable        the blob store could not write or read
    │   └── BlobMissing        no blob has that name
    ├── SinkUnavailable        a broker did not confirm that it has an event
    │   └── MessageTooLarge    and never will: it takes none of that size
    └── EgressError            a request to somebody else brought no answer
        ├── NoPlace            too many calls were under way for too long: nothing was sent
        ├── EgressRefused      the guard said no: nothing was sent, nobody was connected to
        ├── NotConnected       DNS, refused or TLS: the other side never saw the request
        │   └── NoRoute        and it is not the other side's fault
        ├── CallTimedOut       the request may have left; no whole answer in time
        └── ConnectionLost     the request may have left; the connection broke

An expected outcome of a step is a value, not one of these (see `pipeline`).
"""


class DarkroomError(Exception):
    """The root: its text is fit to be shown to whoever caused it."""


class ConfigurationError(DarkroomError):
    """The process must not start; the text is one line that names the setting, file or schema."""


class ApiError(DarkroomError):
    """An error for a client, in the form of contract section 3."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        task_id: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.type = type or type_of(status)
        self.param = param
        self.task_id = task_id
        self.retry_after = retry_after


TYPES = {
    401: "authentication_error",
    402: "insufficient_quota_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


def type_of(status: int) -> str:
    """The `type` of an error without one of its own."""
    return TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


class StoreUnavailable(DarkroomError):
    """The store did not commit, or not in time; the caller was promised nothing."""


class BlobUnavailable(DarkroomError):
    """The blob store failed to write or read; worth another try."""


class BlobMissing(BlobUnavailable):
    """No blob has that name."""


class SinkUnavailable(DarkroomError):
    """A broker did not confirm that it has an event; it may have it all the same. Worth another
    try.
    """


class MessageTooLarge(SinkUnavailable):
    """The broker takes no message of that size."""


class EgressError(DarkroomError):
    """A request to another host brought no whole answer."""


class NoPlace(EgressError):
    """As many calls as may run at once did, for as long as this one could wait; nothing was
    sent.
    """


class EgressRefused(EgressError):
    """The guard refused the address, scheme, port or redirect; nothing was sent."""


class NotConnected(EgressError):
    """No connection was made: the other side cannot have seen the request."""


class NoRoute(NotConnected):
    """No connection could be made for a reason of our own: no name server answered, no network, no
    free port or descriptor.
    """


class CallTimedOut(EgressError):
    """No whole answer within the limit; the other side may have acted."""


class ConnectionLost(EgressError):
    """The connection broke after it was made; the other side may have acted."""
