"""Numbers as text, for people: one set of rules for the terminal, reports and pages."""

from __future__ import annotations

import math

MINUS = "\N{MINUS SIGN}"
UNDEFINED = "—"
# Below this a figure is rounding noise of float64 sums.
_NOISE = 1e-12


def number(value: float | None) -> str:
    """`value` with about four digits, thousands separated, a true minus sign; an em dash for None or NaN.

    Example:
        >>> number(12.345), number(1234567.0), number(2.5e-4), number(-5e-17)
        ('12.35', '1.23e+06', '2.50e−04', '0')
    """
    if value is None or math.isnan(value):
        return UNDEFINED
    size = abs(value)
    if size < _NOISE:
        text = "0"
    elif math.isinf(value):
        text = f"{value}"
    elif value == round(value) and size < 1e6:
        text = f"{value:,.0f}"
    elif 0.1 <= size < 1e4:
        text = f"{value:,.{max(1, 3 - max(0, math.floor(math.log10(size))))}f}"
    elif 1e-3 <= size < 0.1:
        text = f"{value:.{2 - math.floor(math.log10(size))}f}"
    else:
        text = f"{value:.2e}"
    return text.replace("-", MINUS)


def percent(value: float | None) -> str:
    """A share of 1 in percent: 0.263 -> "26.3 %"."""
    if value is None or math.isnan(value):
        return UNDEFINED
    text = f"{100 * value:.1f} %"
    return "0.0 %" if text == "-0.0 %" else text.replace("-", MINUS)


def count(value: float | None) -> str:
    """A whole number, thousands separated."""
    return UNDEFINED if value is None or math.isnan(value) else f"{value:,.0f}".replace("-", MINUS)


def styled(value: float | None, style: str) -> str:
    """`value` in one of the styles of a figure: `number`, `percent`, `count` or `seconds`."""
    if value is None or math.isnan(value):
        return UNDEFINED
    if style == "percent":
        return percent(value)
    if style == "count":
        return count(value)
    return f"{number(value)} s" if style == "seconds" else number(value)


def human_bytes(size_bytes: float) -> str:
    """`size_bytes` with a binary unit: 1536 -> "1.5 KiB"."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while size_bytes >= 1024 and len(units) > 1:
        size_bytes /= 1024
        units.pop(0)
    return f"{size_bytes:.0f} B" if units[0] == "B" else f"{size_bytes:.1f} {units[0]}"


def human_seconds(seconds: float) -> str:
    """`90 s`, `12 min`, `3.4 h`, `5.6 days`: the unit that keeps the figure short."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 86_400:.1f} days"
