"""Numbers as people read them: 134.5 M, 269 MB, ×1.53, −0.012."""

from __future__ import annotations

import math

NBSP = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
DASH = "\N{EN DASH}"
NONE = "\N{EM DASH}"


def fixed(value: float, digits: int) -> str:
    """A fixed number of decimals, thousands apart, with a real minus sign; never `−0`."""
    if not math.isfinite(value):
        return "not finite" if math.isnan(value) else (MINUS if value < 0 else "") + "∞"
    text = f"{value:,.{digits}f}".replace(",", NBSP)
    if not text.strip("-0.").strip(NBSP):
        text = text.removeprefix("-")
    return text.replace("-", MINUS)


def significant(value: float, digits: int = 3) -> str:
    """So many significant digits; very small and very large numbers with an exponent (`2.1e−5`)."""
    if value == 0 or not math.isfinite(value):
        return fixed(value, 0)
    power = math.floor(math.log10(abs(value)))
    if -4 <= power < 6:
        return fixed(value, max(0, digits - 1 - power))
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", MINUS)


def scaled(value: float, unit: str = "", *, names: tuple[str, ...] = ("", "k", "M", "G", "T"), digits: int = 4) -> str:
    """A count with a decimal prefix: 134.5 M."""
    size = abs(value)
    power = 0
    while size >= 999.95 and power < len(names) - 1:
        size /= 1000
        power += 1
    if power == 0:
        text = fixed(value, 0 if float(value).is_integer() else 1)
    else:
        whole = len(str(int(size)))
        text = fixed(math.copysign(size, value), max(0, min(2, digits - whole)))
    return NBSP.join(part for part in (text, names[power] + unit) if part)


def count(value: float) -> str:
    """Parameters: 134.5 M, 1.24 B."""
    return scaled(value, names=("", "k", "M", "B", "T"))


def data(value: float) -> str:
    """Bytes in decimal multiples: 269 MB."""
    return scaled(value, "B", digits=3)


def macs(value: float) -> str:
    """Multiply-adds: 134.5 M."""
    return scaled(value)


def percent(fraction: float) -> str:
    """A fraction as a percentage: 25.1 %."""
    return f"{fixed(100 * fraction, 1)}{NBSP}%"


def times(ratio: float) -> str:
    """A ratio: ×1.53."""
    return TIMES + fixed(ratio, 2 if abs(ratio) < 100 else 0)


def signed(value: float, digits: int = 3) -> str:
    """A difference with its sign: +0.430."""
    return ("+" if value > 0 else "") + fixed(value, digits)


def span(low: str, high: str) -> str:
    """An interval: 1.48–1.59, or `−0.02 to +0.03` where a sign would blur the dash."""
    if MINUS in low or MINUS in high:
        return f"{low} to {high}"
    return f"{low.removeprefix('+')}{DASH}{high.removeprefix('+')}"


def named(resource: str) -> str:
    """A resource in words: `latency@decode:1x512` is seconds of decoding."""
    metric, _, work = resource.partition("@")
    return f"latency of {work}" if work else metric.replace("kv_bytes", "KV bytes per token").replace("_", " ")
