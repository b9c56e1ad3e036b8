"""What a method of each role must offer: one mandatory method, other abilities are separate protocols."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

if TYPE_CHECKING:
    from torch import nn

    from lamina.anatomy import Anatomy
    from lamina.core.documents import Budget, Evidence, Receipt, Step
    from lamina.core.papers import Card
    from lamina.core.scores import Scores
    from lamina.core.sites import Cost, Site
    from lamina.lab.bench import Bench
    from lamina.lab.lab import Lab
    from lamina.lab.taps import Taps


@runtime_checkable
class Measure(Protocol):
    """A published way to score sites."""

    card: ClassVar[Card]

    def measure(self, lab: Lab, /) -> Scores:
        """Score the lab's model on its text."""
        ...


@runtime_checkable
class Streaming(Protocol):
    """A measure that can share one pass with others."""

    card: ClassVar[Card]

    def tally(self, anatomy: Anatomy, /) -> Tally:
        """A fresh, empty tally."""
        ...


@runtime_checkable
class Tally(Protocol):
    """A monoid of float64 sums: shards and machines add up."""

    def add(self, site: Site, taps: Taps, /) -> None:
        """Take in one site on one batch."""
        ...

    def merge(self, other: Self, /) -> Self:
        """The tally of both parts."""
        ...

    def scores(self) -> Scores:
        """Values and standard errors so far."""
        ...


@runtime_checkable
class Planner(Protocol):
    """A way to choose sites within a budget."""

    card: ClassVar[Card]

    def plan(self, scores: Scores, budget: Budget, anatomy: Anatomy, /, bench: Bench | None = None) -> tuple[Step, ...]:
        """The steps, in the order of choosing."""
        ...


@runtime_checkable
class Rewrite(Protocol):
    """A change of weights and structure."""

    card: ClassVar[Card]

    def check(self, step: Step, anatomy: Anatomy, /) -> list[Any]:
        """What stands in the way; needs no weights."""
        ...

    def forecast(self, step: Step, anatomy: Anatomy, /) -> Cost:
        """What the whole model will take."""
        ...

    def apply(self, step: Step, lab: Lab, /) -> Receipt:
        """Change the lab's model."""
        ...

    def replay(self, receipt: Receipt, skeleton: nn.Module, anatomy: Anatomy | None = None, /) -> None:
        """Rebuild the structure on a skeleton."""
        ...


@runtime_checkable
class Healer(Protocol):
    """A way to win back what the rewrite cost."""

    card: ClassVar[Card]

    def heal(self, lab: Lab, /, *, teacher: nn.Module | None, steps: int | None, minutes: float | None) -> Any:
        """Train the lab's model in place and return its history."""
        ...


@runtime_checkable
class Evaluator(Protocol):
    """A way to measure what a model does."""

    card: ClassVar[Card]

    def evaluate(self, lab: Lab, /, *, reference: nn.Module | None) -> tuple[Evidence, ...]:
        """Evidence on the lab's model and text, against the dense reference."""
        ...


@runtime_checkable
class Exporter(Protocol):
    """A way to write a checkpoint."""

    card: ClassVar[Card]

    def check(self, receipts: Sequence[Receipt], /) -> list[Any]:
        """Which engine will not load it, and why."""
        ...

    def export(self, model: nn.Module, run: Any, to: Path, /) -> Iterable[Path]:
        """Write the files."""
        ...
