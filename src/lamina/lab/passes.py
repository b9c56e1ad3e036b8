"""The three kinds of pass that measures share: a forward, a forward with backwards, and the sweep of trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lamina.core.errors import UnsupportedError
from lamina.core.papers import Need
from lamina.core.scores import Scores

if TYPE_CHECKING:
    from lamina.lab.lab import Lab

SHARED = (Need.FORWARD, Need.GRADIENT, Need.ABLATION)


def shares(measure: Any) -> bool:
    """Whether a measure can share a pass with others; one that is `alone` asks for a text or a seed of its own."""
    return hasattr(measure, "tally") and measure.card.needs in SHARED and not getattr(measure, "alone", False)


class Guarded:
    """A tally that a model may not allow: it is not asked again after it has said so, and the others go on."""

    def __init__(self, tally: Any) -> None:
        self.tally, self.why = tally, ""
        for ability in ("wants", "probes", "kinds"):
            if hasattr(tally, ability):
                setattr(self, ability, getattr(tally, ability))

    def add(self, site: Any, taps: Any) -> None:
        """Hand on one site on one batch, unless the tally has refused the model."""
        if not self.why:
            try:
                self.tally.add(site, taps)
            except UnsupportedError as error:
                self.why = str(error)

    def refuse(self, why: str) -> None:
        """Take note that the model does not allow the measure."""
        self.why = self.why or why

    def merge(self, other: Any) -> Any:
        """Not for merging: what it guards is."""
        raise TypeError("merge the tallies themselves")

    def scores(self) -> Scores:
        """The tally's scores."""
        return self.tally.scores()


def tallied(
    lab: Lab, measures: Mapping[str, Any], stream: Callable[[Lab, list[Any]], Any] | None = None
) -> dict[str, Any]:
    """The tallies of measures that share passes, after these were run: at most one forward, with backwards if any
    measure asks for gradients, and one sweep. A measure that the model does not allow has an UnsupportedError instead.

    `stream`: what makes the forward where it is not the lab's own.
    """
    found: dict[str, Any] = {}
    for name, measure in measures.items():
        try:
            found[name] = Guarded(measure.tally(lab.anatomy))
        except UnsupportedError as error:
            found[name] = error
    usable = [(measures[n].card.needs, t) for n, t in found.items() if isinstance(t, Guarded)]
    _run(lab, {need: [t for n, t in usable if n is need] for need in SHARED}, stream)
    return {n: UnsupportedError(t.why) if getattr(t, "why", "") else getattr(t, "tally", t) for n, t in found.items()}


def _run(lab: Lab, of: Mapping[Need, list[Any]], stream: Callable[[Lab, list[Any]], Any] | None) -> None:
    from lamina.lab.gradients import expect_differentiable, stream_gradients

    streaming, graded, trying = (of[need] for need in SHARED)
    if stream is not None:
        stream(lab, streaming)
        return
    try:
        expect_differentiable(lab.anatomy)
    except UnsupportedError as error:
        for tally in graded:
            tally.why = str(error)
        graded = []
    if graded:
        stream_gradients(lab, [*streaming, *graded], what="survey", score=False)
    elif streaming:
        lab.stream(streaming, score=False)
    if trying:
        lab.sweep(trying, score=False)


def merged(parts: Sequence[Any]) -> Any:
    """The tally of all parts of a text."""
    refusal = next((p for p in parts if isinstance(p, UnsupportedError)), None)
    if refusal is not None:
        return refusal
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merge(part)
    return whole


def finished(lab: Lab, measure: Any, tally: Any) -> Scores:
    """A measure's scores from its tally of the lab's whole text; why it has none, where the model does not allow it."""
    name = measure.card.name
    if isinstance(tally, UnsupportedError):
        return Scores.none(name, str(tally))
    try:
        return measure.finish(lab, tally) if hasattr(measure, "finish") else tally.scores()
    except UnsupportedError as error:
        return Scores.none(name, str(error))


def own(lab: Lab, measure: Any) -> Scores:
    """The scores of a measure that runs passes of its own."""
    try:
        return measure.measure(lab)
    except UnsupportedError as error:
        return Scores.none(measure.card.name, str(error))
