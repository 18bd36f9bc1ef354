"""Credits: decimal numbers outside, integers in millionths of a credit inside."""

from decimal import ROUND_HALF_EVEN, Decimal, InvalidOperation

MAX_CREDITS = 10**12  # in millionths still a 64-bit integer


def millionths(value: object) -> int | None:
    """The upstream's decimal credits. None: they are absent, negative, NaN or too large."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        return None
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        return None
    if not number.is_finite() or number < 0 or number > MAX_CREDITS:
        return None
    return int((number * 1_000_000).to_integral_value(ROUND_HALF_EVEN))


def credits_number(value: int | None) -> int | float | None:
    """Millionths as the JSON number the upstream would write: 1, 8.7, 0.05."""
    if value is None:
        return None
    return value // 1_000_000 if value % 1_000_000 == 0 else value / 1_000_000


def credits_text(value: int | None) -> str:
    """Millionths in words of a message, never with an exponent."""
    return "unknown" if value is None else f"{Decimal(value).scaleb(-6).normalize():f}"
