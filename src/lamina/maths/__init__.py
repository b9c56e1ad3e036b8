"""Pure functions on tensors and arrays. Submodules load when first used, so that papers need no torch to be listed."""

import importlib
from typing import Any

_PARTS = ("bootstrap", "moments", "divergence", "jackknife")


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return importlib.import_module(f"lamina.maths.{name}")
    raise AttributeError(f"lamina.maths has no {name!r}")
