"""Numbers and names as people read them: units, significant digits, and no control characters."""

from __future__ import annotations

import math

MISSING = "–"
NO_BREAK = "\N{NO-BREAK SPACE}"


def safe(text: str) -> str:
    """``text`` on one line, every unprintable character (escape codes, bidi overrides) replaced by its escape."""
    return "".join(c if c.isprintable() or c == NO_BREAK else c.encode("unicode_escape").decode() for c in text)


def size(nbytes: int) -> str:
    """Bytes in decimal units with three significant digits: ``1.94 GB``."""
    unit, factor = size_unit(nbytes)
    return f"{_significant(nbytes / factor)} {unit}"


def size_unit(nbytes: int) -> tuple[str, float]:
    """The largest decimal unit that keeps ``nbytes`` at or above one, and how many bytes it has."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return unit, factor
    return "B", 1.0


def duration(seconds: float) -> str:
    """Seconds, minutes or hours: ``38.2 s``, ``14 min``, ``2 h 05 min``."""
    if not math.isfinite(seconds):
        return MISSING
    if seconds < 120:
        return f"{_significant(seconds)} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def number(value: float | None, *, signed: bool = False) -> str:
    """Three significant digits with a true minus sign; a dash for None and NaN."""
    if value is None or not math.isfinite(value):
        return MISSING
    return _sign(_significant(value), value, signed)


def estimate(value: float, low: float | None, high: float | None, *, signed: bool = False) -> tuple[str, str]:
    """A value and its interval, ``("0.0213", "[0.0204, 0.0222]")``, to the digits that the interval supports.

    The interval is an empty string where it was not measured.
    """
    if low is None or high is None or not all(map(math.isfinite, (value, low, high))):
        return number(value, signed=signed), ""
    half = (high - low) / 2
    if half <= 0:
        text = number(value, signed=signed)
        return text, f"[{text}, {text}]"
    # two digits of the half width where it starts with 1 or 2, else one: rounding stays under 5 % of the interval
    lead = math.floor(math.log10(half))
    places = max(0, -lead + (half / 10**lead < 3))
    spell = (lambda x: f"{x:.1e}") if places > 7 else (lambda x: f"{x:.{places}f}")
    value_text, low_text, high_text = (_sign(spell(x), x, signed) for x in (value, low, high))
    return value_text, f"[{low_text}, {high_text}]"


def p_value(p: float | None) -> str:
    """Two significant digits, ``<0.001`` below that; a dash for None and NaN."""
    if p is None or not math.isfinite(p):
        return MISSING
    return "<0.001" if p < 0.001 else f"{p:.2g}"


def _significant(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) < 1e-5:
        return f"{value:.1e}"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


def _sign(text: str, value: float, signed: bool) -> str:
    digits = text.removeprefix("-")
    if not any(c in "123456789" for c in digits):
        return digits
    return f"−{digits}" if value < 0 else f"+{digits}" if signed else digits
