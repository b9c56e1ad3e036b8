"""Damage after healing: what a site's absence still costs once the rest has been trained a little to do without it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lamina.core.papers import Card, Need
from lamina.core.registry import HEALERS, measure, recipe
from lamina.core.scores import Scores
from lamina.core.sites import Kind
from lamina.maths.moments import Mean

if TYPE_CHECKING:
    from lamina.lab import Lab


@measure("healed-damage", None, on=Kind.BLOCK, needs=Need.ABLATION)
@dataclass(frozen=True, kw_only=True)
class HealedDamage:
    """The rise of the next-token loss, in nats, without the site and after `steps` of healing towards the dense model.

    A probe: what seems dear at once may be cheap after healing, and sites change places. For each site a copy of the
    model is healed by `healer` (with `options`) on the first half of the text and judged on the other: `steps` forwards
    and backwards on a few sequences and one forward over half the text, in all 3 · `steps` · batch / sequences + 1
    forwards for each site. `kinds` are the sites; of the text `sequences` are used, their first `length` tokens.
    """

    card: ClassVar[Card]
    known_failures: ClassVar[Mapping[str, str]] = {
        "check_errors_are_over_sequences": "a fixed number of sequences is used, however many there are",
    }

    steps: int = 8
    healer: str = "lora"
    options: tuple[tuple[str, Any], ...] = ()
    kinds: tuple[Kind, ...] = (Kind.BLOCK,)
    sequences: int = 16
    length: int = 256

    def __post_init__(self) -> None:
        if min(self.steps, self.length) < 1 or self.sequences < 2:
            raise ValueError("steps and length are at least 1, sequences at least 2")

    def measure(self, lab: Lab) -> Scores:
        """One probe for each site; the model is left as it is."""
        part = lab.part(self.sequences, self.length)
        half = max(1, len(part.batches) // 2)
        learnt, judged = part.batches[:half], part.on(part.batches[half:] or part.batches)
        dense, tokens = (x.cpu().numpy() for x in judged.losses())
        lab.counts.blocks += judged.counts.blocks
        sites = lab.anatomy.of_kind(*self.kinds)
        values, errors = {}, {}
        for number, site in enumerate(sites):
            sums = self._healed(lab, learnt, judged, site.id)
            found = Mean()
            found.add(sums - dense, tokens)
            values[site.id], errors[site.id] = np.array([found.value]), np.array([found.stderr])
            lab.progress("healed", number + 1, len(sites))
        return Scores(measure=self.card.name, values=values, stderr=errors, unit="nats")

    def _healed(self, lab: Lab, learnt: Any, judged: Lab, site: str) -> Any:
        """Losses [sequences] of the judged text without the site, by a copy that was healed."""
        from lamina.lab import Lab as Other

        model = copy.deepcopy(lab.model)
        probe = Other(model, learnt, seed=lab.seed)
        with probe.ablate([site]):
            healer = HEALERS.make(self.healer, dict(self.options))
            healer.heal(probe, teacher=lab.model, steps=self.steps)
            sums = Other(model, judged.batches, anatomy=probe.anatomy).losses([])[0]
        return sums.cpu().numpy()


recipe(
    "healed",
    None,
    summary="The blocks whose absence costs least after a few steps of healing go, scored once.",
    measure="healed-damage",
    planner="lowest",
    kinds=(Kind.BLOCK,),
)
