"""Which engines load a thinned checkpoint, said truthfully."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lamina.core import registry

if TYPE_CHECKING:
    from lamina.core.documents import Receipt


def stock(receipts: Sequence[Receipt]) -> bool:
    """Whether only whole blocks are gone, so that the stock class loads the checkpoint."""
    return not any(step["branches"] for r in receipts for step in r.structure.get("steps", ()))


def verdicts(receipts: Sequence[Receipt], model: Any = None) -> list[str]:
    """One line per engine: what loads it, or why it does not."""
    if stock(receipts):
        lines = ["transformers: loads as a plain checkpoint of the stock class"]
    else:
        lines = ["transformers: loads with trust_remote_code=True (modeling_lamina.py travels with the weights)"]
    for name in registry.EXPORTERS:
        if name == "hf":
            continue
        exporter = registry.EXPORTERS.make(name)
        problems = exporter.check(receipts, model) if model is not None else exporter.check(receipts)
        if problems:
            first = problems[0]
            lines.append(f"{name}: no, {first.where + ': ' if first.where else ''}{first.what}")
        else:
            lines.append(f"{name}: yes, lamina export RUN --format {name}")
    return lines
