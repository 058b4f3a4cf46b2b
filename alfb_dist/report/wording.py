"""Numbers, bytes and durations in few characters."""

from __future__ import annotations

import math
from typing import Any

_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def count(value: Any, digits: int = 3) -> str:
    """Return a number to `digits` digits: 950, 12.3k, 4.56M, 671B; "-" if there is none."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "-"
    for size, unit in _UNITS:
        if abs(value) >= size * (1 - 0.5 * 10**-digits):  # also what would be rounded up to the unit
            scaled = value / size
            decimals = max(0, digits - len(f"{abs(scaled):.0f}"))
            return f"{scaled:.{decimals}f}{unit}"
    return f"{value:.{digits}g}"


def decimal(value: Any, decimals: int = 3) -> str:
    """Return a number with fixed decimals, "-" if there is none."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "-"
    return f"{value:.{decimals}f}"


def human(num_bytes: float) -> str:
    """Return a number of bytes in powers of 1024: 1536 as "1.5 KiB"."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while abs(num_bytes) >= 1024 and power < len(units) - 1:
        num_bytes, power = num_bytes / 1024, power + 1
    return f"{num_bytes:.{0 if power == 0 else 1}f} {units[power]}"


def duration(seconds: float) -> str:
    """Return seconds as h:mm:ss, or m:ss under an hour; "-" if unknown."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
