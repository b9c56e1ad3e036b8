"""Memory: the weights, and the most that a forward holds beside them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lamina.core.documents import Evidence
from lamina.core.errors import UnsupportedError
from lamina.core.registry import evaluator

if TYPE_CHECKING:
    from torch import nn

    from lamina.lab import Lab

CHILD = "lamina.evaluators._resident_child"
TIMEOUT = 600.0


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Bytes at the peak of a prefill: weights, the cache that it leaves, and all else that lives beside them."""

    weights: int
    kv: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.activations


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
        own = peak(bench, lab.model, ids)
        whole = None if reference is None else peak(bench, reference, ids)
        lab.progress("memory", 1, 1)
        what = "allocator" if ids.device.type == "cuda" else "live tensors"
        how = f"weights and peak of a prefill of {ids.shape[0]}×{ids.shape[1]} tokens, {what}"
        rows = [Evidence(name="peak_memory", value=float(own.total), unit="B", n=1, how=f"{how}: {_parts(own)}")]
        if whole is not None:
            told = f"{how}: {_parts(whole)}"
            rows.insert(0, Evidence(name="peak_memory", value=float(whole.total), unit="B", of="dense", n=1, how=told))
            ratio = own.total / whole.total
            rows.append(Evidence(name="peak_memory", value=ratio, of="ratio", n=1, how="thinned / dense"))
        return tuple(rows)


def _parts(found: Peak) -> str:
    shares = {"weights": found.weights, "cache": found.kv, "activations": found.activations}
    return ", ".join(f"{value / max(found.total, 1):.0%} {name}" for name, value in shares.items())


def peak(bench: Any, model: nn.Module, ids: Any) -> Peak:
    """What a prefill of token ids [batch, length] holds; `bench`: Workloads."""
    from lamina.anatomy.costs import weigh
    from lamina.evaluators._live import peak_of
    from lamina.lab.workloads import cache_bytes

    kept: list[int] = []

    def run() -> None:
        kept.append(cache_bytes(getattr(bench.prefill(model, ids), "past_key_values", None)))

    most = peak_of(run, ids.device)
    return Peak(weights=weigh(model.parameters()).bytes, kv=kept[0], activations=most - kept[0])


def resident(job: Mapping[str, Any], *, timeout: float = TIMEOUT) -> tuple[int | None, int | None]:
    """The peak of resident memory, in bytes, of a fresh process that loads one model and answers once; and what it had
    before the model. None where the system doesn't tell.

    `job`: `spec`, `dtype` and `trust_remote_code` as `lab.load` takes them, `prompt` [batch][length], `decode`,
    `threads`. Loading is left out of the peak where the system allows it. Raises UnsupportedError where the
    process fails.
    """
    command, what = [sys.executable, "-m", CHILD], "the process that measures resident memory failed"
    try:
        done = subprocess.run(
            command, input=json.dumps(job), capture_output=True, text=True, check=False, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise UnsupportedError(f"{what}: no answer in {timeout:.0f} s", where=job["spec"]) from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1]
        raise UnsupportedError(f"{what}: {last}", where=job["spec"])
    found = json.loads(done.stdout.splitlines()[-1])
    return found["peak"], found["before"]
