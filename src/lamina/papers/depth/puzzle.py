"""Puzzle: one layer at a time is replaced in the whole model, here by nothing, and the model's output is compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.sites import SUBLAYERS, Kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from lamina.anatomy import Anatomy
    from lamina.core.scores import Scores
    from lamina.lab import Lab
    from lamina.lab.per_trial import PerTrial, Sums
    from lamina.lab.trials import Trial

PAPER = Paper(
    key="bercovich2024puzzle",
    title="Puzzle: Distillation-Based NAS for Inference-Optimized LLMs",
    authors=(
        "Akhiad Bercovich",
        "Tomer Ronen",
        "Talor Abramovich",
        "Nir Ailon",
        "Nave Assaf",
        "Mohammad Dabbah",
        "Ido Galil",
        "Amnon Geifman",
        "Yonatan Geifman",
        "Izhak Golan",
        "Netanel Haber",
        "Ehud Karpas",
        "Roi Koren",
        "Itay Levy",
        "Pavlo Molchanov",
        "Shahar Mor",
        "Zach Moshe",
        "Najeeb Nabwani",
        "Omri Puny",
        "Ran Rubin",
        "Itamar Schen",
        "Ido Shahaf",
        "Oren Tropp",
        "Omer Ullman Argov",
        "Ran Zilberstein",
        "Ran El-Yaniv",
    ),
    year=2024,
    arxiv="2411.19146",
)
METRICS = ("kl", "loss", "cosine")


@measure(
    "replace-one",
    PAPER,
    on=(Kind.BLOCK, *sorted(SUBLAYERS)),
    needs=Need.ABLATION,
    status="stable",
    deviations=(
        "of the paper's alternatives for a layer, the empty one alone is scored",
        "cosine compares the streams behind the last block of the site's stack, before the final norm",
    ),
)
@dataclass(frozen=True, kw_only=True)
class ReplaceOne:
    """The price of an empty layer in the place of one: KL of the output distributions, loss, or last states' cosine.

    `metric`: "kl" (dense to thinned, in nats), "loss" (rise of the next-token loss) or "cosine" (1 - cos of the last
    hidden states); means over positions.
    """

    card: ClassVar[Card]

    metric: str = "kl"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"metric is one of {', '.join(METRICS)}, not {self.metric!r}")

    def tally(self, anatomy: Anatomy) -> PerTrial:
        """Means over positions, from the shared sweep."""
        from lamina.lab.per_trial import OutputKL, PerTrial

        score: Callable[[Trial], Sums] = {"kl": OutputKL(), "loss": _loss, "cosine": _cosine}[self.metric]
        return PerTrial(self.card.name, self.card.on, score, unit="nats" if self.metric == "loss" else "")

    def measure(self, lab: Lab) -> Scores:
        """One partial forward per block and sublayer."""
        return lab.sweep([self.tally(lab.anatomy)])[0]


def _loss(trial: Trial) -> Sums:
    from lamina.core.errors import UnsupportedError
    from lamina.lab.per_trial import rise

    if trial.objective.name != "next-token":
        hint = "metric=kl compares distributions, metric=cosine states"
        raise UnsupportedError("the model predicts no next tokens, so there is no loss", where="metric loss", hint=hint)
    return rise(trial)


def _cosine(trial: Trial) -> Sums:
    from lamina.lab.per_trial import over_states, turned

    return over_states(trial, trial.blocks[-1], turned)
