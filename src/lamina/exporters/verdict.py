"""Which engines load a thinned checkpoint, said truthfully."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lamina.core import registry

if TYPE_CHECKING:
    from lamina.core.documents import Receipt


def stock(receipts: Sequence[Receipt], model: Any = None) -> bool:
    """Whether the stock class loads the checkpoint: whole blocks are gone, or the config tells all widths.

    Without the model only receipts of drops can tell.
    """
    if model is not None and getattr(model, "config", None) is not None:
        from lamina.exporters.hf import form

        return form(model, receipts) == "stock"
    steps = [step for r in receipts for step in r.structure.get("steps", ())]
    return not any(step.get("branches") or step["kind"] != "drop" for step in steps)


def verdicts(receipts: Sequence[Receipt], model: Any = None) -> list[str]:
    """One line per engine: what loads it, or why it does not."""
    if stock(receipts, model):
        lines = ["transformers: loads as a plain checkpoint of the stock class"]
    else:
        lines = ["transformers: loads with trust_remote_code=True (modeling_lamina.py travels with the weights)"]
    for name in registry.EXPORTERS:
        if name == "hf":
            continue
        exporter = registry.EXPORTERS.make(name)
        if not getattr(exporter, "tells", True):
            continue
        problems = exporter.check(receipts, model) if model is not None else exporter.check(receipts)
        if problems:
            first = problems[0]
            lines.append(f"{name}: no, {first.where + ': ' if first.where else ''}{first.what}")
        else:
            lines.append(f"{name}: yes, lamina export RUN --format {name}")
    return lines
