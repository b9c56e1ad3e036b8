"""Steps as lines of YAML that read back as exactly what they were; long lists of units packed for the page."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lamina.core.documents import Step

PLACE, PACKED = "\u0001", "\u0002"
"""Marks for the page: of the place that a step is for, and around a packed list."""
_ODD = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
LONG = 24
"""Lists of so many units or more are packed."""


def flow(value: Any) -> str:
    """Plain data in flow style, numbers so that YAML 1.1 and 1.2 read the same: `1.0e-05`, not `1e-05`."""
    return Texts().of(value)


@dataclass
class Texts:
    """Data as text. With a place, strings that begin with that site begin with a mark, and long lists are packed."""

    _packed: dict[tuple[int, ...], str] = field(default_factory=dict[tuple[int, ...], str])

    def step(self, step: Step, place: str = "") -> str:
        """A step but for its reasons, without the braces."""
        options = f", options: {self.of(step.options, place)}" if step.options else ""
        return f"rewrite: {self.of(step.rewrite)}, sites: {self.of(step.sites, place)}{options}"

    def of(self, value: Any, place: str = "") -> str:
        """Plain data in flow style."""
        if isinstance(value, Mapping):
            rows = (f"{_quoted(str(k), place)}: {self.of(v, place)}" for k, v in value.items())
            return "{" + ", ".join(rows) + "}"
        if isinstance(value, list | tuple):
            if place and len(value) >= LONG and _units(value):
                return f"{PACKED}{self._bits(tuple(value))}{PACKED}"
            return "[" + ", ".join(self.of(v, place) for v in value) + "]"
        if isinstance(value, str):
            return _quoted(value, place)
        if isinstance(value, float):
            return _number(value)
        return json.dumps(value)

    def _bits(self, units: tuple[int, ...]) -> str:
        if units not in self._packed:
            self._packed[units] = packed(units)
        return self._packed[units]


def packed(units: tuple[int, ...]) -> str:
    """Ascending units as base64 of a row of bits, the least first."""
    bits = bytearray(units[-1] // 8 + 1)
    for unit in units:
        bits[unit >> 3] |= 1 << (unit & 7)
    return base64.b64encode(bytes(bits)).decode()


def _units(value: list[Any] | tuple[Any, ...]) -> bool:
    """Whether these are ascending whole numbers, dense enough that bits are shorter."""
    if set(map(type, value)) != {int} or value[0] < 0 or value[-1] >= LONG * len(value):
        return False
    return len(set(value)) == len(value) and sorted(value) == list(value)


def _number(value: float) -> str:
    if not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    mantissa, e, power = repr(value).partition("e")
    return mantissa + (".0" if e and "." not in mantissa else "") + e + power


def _quoted(value: str, place: str) -> str:
    if place and (value == place or value.startswith(place + ".")):
        return f'"{PLACE}{_escaped(value.removeprefix(place))[1:]}'
    return _escaped(value)


def _escaped(value: str) -> str:
    """In double quotes; what YAML does not print, or takes for the end of a line, by its number."""
    return _ODD.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))
