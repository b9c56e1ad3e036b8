"""The bench: model, batches, taps, trial ablation, prefix reuse."""

from lamina.lab.bench import Bench
from lamina.lab.judge import Judge
from lamina.lab.lab import Counts, Lab
from lamina.lab.protocols import (
    Evaluator,
    Exporter,
    Healer,
    Measure,
    Planner,
    Rewrite,
    Streaming,
    Tally,
)
from lamina.lab.taps import Taps

__all__ = [
    "Bench",
    "Counts",
    "Evaluator",
    "Exporter",
    "Healer",
    "Judge",
    "Lab",
    "Measure",
    "Planner",
    "Rewrite",
    "Streaming",
    "Tally",
    "Taps",
]
