"""The `Retry-After` header (RFC 9110, section 10.2.3)."""

from datetime import UTC
from email.utils import parsedate_to_datetime


def retry_after(value: str | None, now: float, limit: float = 3600) -> float | None:
    """Seconds to wait, from 0 to `limit`. None: the header is absent, or neither a number of
    seconds nor an HTTP date.
    """
    text = (value or "").strip(" \t")
    if text.isascii() and text.isdigit():
        return min(float(text), limit)  # an endless row of digits becomes infinity, not an error
    if not 0 < len(text) <= 64:
        return None
    try:
        date = parsedate_to_datetime(text)
        # asctime's form names no zone: HTTP means GMT
        then = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return min(max(then - now, 0.0), limit)
