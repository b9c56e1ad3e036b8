"""lamina: find the layers that a pretrained network does not need, take them out, and prove what that cost."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy
    from lamina.api import apply, compare, heal, plan, prove, speed, survey, thin
    from lamina.lab import Lab
    from lamina.lab.load import load

__version__ = "0.1.0"
__all__ = ["Anatomy", "Lab", "apply", "compare", "heal", "load", "plan", "prove", "speed", "survey", "thin"]
_HOMES = {
    "Anatomy": "lamina.anatomy",
    "Lab": "lamina.lab",
    "load": "lamina.lab.load",
    **dict.fromkeys(("apply", "compare", "heal", "plan", "prove", "speed", "survey", "thin"), "lamina.api"),
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lamina' has no attribute {name!r}")
