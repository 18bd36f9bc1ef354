"""All exceptions that Darkroom raises on purpose, in one tree. Errors of libraries are translated
once, where they enter.

    DarkroomError
    ├── ConfigurationError     the process must not start: one line, then exit
    │   ├── SettingsError          settings are unknown or wrong
    │   ├── StoreInUse             another process has the embedded store
    │   └── SchemaMismatch         the store's schema is older or newer than this program's
    ├── ApiError               an error response to a client: status, code, message, param
    ├── StoreUnavailable       the store did not commit, or not in time: it promised nothing
    ├── BlobUnavailable        the blob store could not write or read: worth a retry
    │   └── BlobMissing        no blob has that name
    ├── SinkUnavailable        a broker did not confirm an event, but may have it: worth a retry
    │   └── MessageRefused     the broker refused this message, and may accept others
    │       └── MessageTooLarge    the broker accepts no message of that size
    └── EgressError            a request to another host brought no whole response
        ├── NoPlace            the concurrency limit was reached for too long: nothing was sent
        ├── EgressRefused      the guard refused address, scheme, port or redirect: nothing was sent
        ├── NotConnected       DNS, refused or TLS: the other side never saw the request
        │   └── NoRoute        the cause is this machine: no name server, network, port, descriptor
        ├── CallTimedOut       no whole response in time: the other side may have acted
        └── ConnectionLost     the connection broke after it was made: the other side may have acted

An expected outcome of a step is a value instead of an exception.
"""

from collections.abc import Mapping


class DarkroomError(Exception):
    """The root. Its text may be shown to the client or operator that caused it."""


class ConfigurationError(DarkroomError):
    """The process must not start. The text is one line that names the setting, file or schema."""


class SettingsError(ConfigurationError):
    """`complaints`: the line about each wrong setting, by its variable."""

    def __init__(self, complaints: Mapping[str, str]) -> None:
        super().__init__("; ".join(complaints.values()))
        self.complaints = complaints


class StoreInUse(ConfigurationError): ...


class SchemaMismatch(ConfigurationError): ...


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
    """The `type` of an error that names none."""
    return TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


class ApiError(DarkroomError):
    """An error response to a client (docs/api.md). `figures`: further keys of the error."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        task_id: str | None = None,
        retry_after: int | None = None,
        figures: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.task_id = task_id
        self.retry_after = retry_after
        self.figures = figures or {}


def invalid_request(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, "invalid_request", message, param=param)


class StoreUnavailable(DarkroomError): ...


class BlobUnavailable(DarkroomError): ...


class BlobMissing(BlobUnavailable): ...


class SinkUnavailable(DarkroomError): ...


class MessageRefused(SinkUnavailable): ...


class MessageTooLarge(MessageRefused): ...


class EgressError(DarkroomError): ...


class NoPlace(EgressError): ...


class EgressRefused(EgressError):
    """`for_now`: the same URL may be allowed later, because a name server, a list in a setting or a
    redirect caused the refusal, or the upstream may give another URL for one that cannot be read,
    which has no `host`. `setting` names the list that lacks the host or its address.
    """

    def __init__(
        self, message: str, *, host: str = "", for_now: bool = False, setting: str | None = None
    ) -> None:
        super().__init__(message)
        self.host = host
        self.for_now = for_now
        self.setting = setting


class NotConnected(EgressError): ...


class NoRoute(NotConnected): ...


class CallTimedOut(EgressError): ...


class ConnectionLost(EgressError): ...


def cause_of(error: Exception) -> str | None:
    """The error of a library behind one of ours, for a log line. It has no statement of SQL."""
    cause = error.__cause__
    return repr(getattr(cause, "orig", cause)) if cause else None
