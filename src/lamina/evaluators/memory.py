"""Memory: the weights, and the most that a forward holds beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lamina.core.documents import Evidence
from lamina.core.registry import evaluator

if TYPE_CHECKING:
    from torch import nn

    from lamina.lab import Lab


@evaluator("memory", status="stable")
@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak memory of a prefill: weights, plus the most that its tensors take at one time, cache and logits included.

    On a GPU by the allocator's own statistics. On a CPU the live tensors are counted as ops make and free them: the
    same in every run, and without the scratch space inside a kernel, the Python process and its libraries.
    """

    batch: int = 1
    length: int = 256

    def __post_init__(self) -> None:
        if self.batch < 1 or self.length < 2:
            raise ValueError(f"batch × length must be at least 1 × 2, not {self.batch} × {self.length}")

    def evaluate(self, lab: Lab, /, *, reference: nn.Module | None) -> tuple[Evidence, ...]:
        """Evidence `peak_memory` in bytes of `lab.model`, of `reference`, and their ratio."""
        from lamina.lab.workloads import Workloads

        bench = Workloads(lab, self.batch)
        ids = bench.ids(self.length)
        lab.progress("memory", 0, 1)
        own = _peak(bench, lab.model, ids)
        whole = None if reference is None else _peak(bench, reference, ids)
        lab.progress("memory", 1, 1)
        what = "allocator" if ids.device.type == "cuda" else "live tensors"
        how = f"weights and peak of a prefill of {ids.shape[0]}×{ids.shape[1]} tokens, {what}"
        rows = [Evidence(name="peak_memory", value=float(own), unit="B", n=1, how=how)]
        if whole is not None:
            rows.insert(0, Evidence(name="peak_memory", value=float(whole), unit="B", of="dense", n=1, how=how))
            rows.append(Evidence(name="peak_memory", value=own / whole, of="ratio", n=1, how="thinned / dense"))
        return tuple(rows)


def _peak(bench: Any, model: nn.Module, ids: Any) -> int:
    from lamina.anatomy.costs import weigh
    from lamina.evaluators._live import peak_of

    return weigh(model.parameters()).bytes + peak_of(lambda: bench.prefill(model, ids), ids.device)
