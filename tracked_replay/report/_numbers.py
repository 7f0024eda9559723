"""Numbers as people write them: decimals instead of exponents wherever they stay short."""

from __future__ import annotations

from decimal import Decimal

_MINUS = "−"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_SMALLEST_DECIMAL = 1e-5
_LARGEST_DECIMAL = 1e9


def decimal(value: float, digits: int = 2) -> str:
    """Return a number with `digits` significant digits: ``0.012``, ``−1,234``, ``3.4 × 10⁻⁷``; zero is ``0``."""
    if value == 0:
        return "0"
    sign, size = (_MINUS if value < 0 else ""), abs(value)
    rounded = f"{size:.{digits - 1}e}"
    if not _SMALLEST_DECIMAL <= size < _LARGEST_DECIMAL:
        mantissa, exponent = rounded.split("e")
        return f"{sign}{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    return sign + (f"{size:,.0f}" if size >= 10 ** (digits - 1) else f"{Decimal(rounded):f}")


def signed_decimal(value: float, digits: int = 2) -> str:
    """Return a number as `decimal` does, with a plus sign where it is positive."""
    return f"{'+' if value > 0 else ''}{decimal(value, digits)}"
