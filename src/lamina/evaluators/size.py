"""Size: parameters, bytes of weights, and cache bytes per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lamina.core.documents import Evidence
from lamina.core.registry import evaluator

if TYPE_CHECKING:
    from torch import nn

    from lamina.lab import Lab

UNITS = {"parameters": "", "bytes": "B", "kv_bytes": "B/token"}


@evaluator("size", status="stable")
@dataclass(frozen=True, kw_only=True)
class Size:
    """Parameters and bytes of weights (tied ones once), and what the cache takes per token: exact counts."""

    def evaluate(self, lab: Lab, /, *, reference: nn.Module | None) -> tuple[Evidence, ...]:
        """Evidence `parameters`, `bytes` and `kv_bytes` of `lab.model`, of `reference`, and their ratio."""
        from lamina.anatomy import Anatomy

        thinned = lab.anatomy.total()
        dense = None if reference is None else Anatomy.of(reference).total()
        rows = []
        for name, unit in UNITS.items():
            own = getattr(thinned, name)
            if dense is not None:
                whole = getattr(dense, name)
                rows.append(Evidence(name=name, value=float(whole), unit=unit, of="dense", how="counted"))
                if whole:
                    rows.append(Evidence(name=name, value=own / whole, of="ratio", how="thinned / dense"))
            rows.append(Evidence(name=name, value=float(own), unit=unit, of="thinned", how="counted"))
        return tuple(rows)
