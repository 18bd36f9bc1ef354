"""The `Retry-After` header (RFC 9110, section 10.2.3): read below the pipeline too, by upstreams
and sinks.
"""

from datetime import UTC
from email.utils import parsedate_to_datetime


def retry_after(value: str | None, now: float, limit: float = 3600) -> float | None:
    """Seconds to wait, within 0 and `limit`; the header is a number of seconds or an HTTP date.
    None: absent, or neither of them.
    """
    text = (value or "").strip(" \t")
    if text.isascii() and text.isdigit():
        return min(float(text), limit)  # digits without end are infinity here, not an error
    if not 0 < len(text) <= 64:
        return None
    try:
        date = parsedate_to_datetime(text)
        then = (
            date if date.tzinfo else date.replace(tzinfo=UTC)
        ).timestamp()  # asctime's form names no zone: it is GMT
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return min(max(then - now, 0.0), limit)
