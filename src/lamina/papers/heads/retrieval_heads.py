"""Retrieval heads: those that look at the very token of a planted needle that the model then says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.core.scores import Scores
    from lamina.core.sites import Site
    from lamina.lab import Lab
    from lamina.lab.taps import Taps

PAPER = Paper(
    key="wu2024retrieval",
    title="Retrieval Head Mechanistically Explains Long-Context Factuality",
    authors=("Wenhao Wu", "Yizhong Wang", "Guangxuan Xiao", "Hao Peng", "Yao Fu"),
    year=2024,
    arxiv="2404.15574",
)


@measure(
    "retrieval-heads",
    PAPER,
    on=Kind.HEAD,
    needs=Need.ABLATION,
    deviations=(
        "needles are runs of random tokens and are asked for by their first tokens; the paper plants sentences and "
        "asks questions, so that here nothing but copying helps",
        "the answer is teacher-forced: each step sees the needle's true tokens, not the model's own",
        "the score is divided by the tokens that are to be copied, so that it reaches 1; the code divides by the "
        "whole needle's length",
        "recall is that of single tokens, not of words",
    ),
)
@dataclass(frozen=True, kw_only=True)
class RetrievalHeads:
    """How often a head's largest weight is on the needle's token that the model then says, over needles found again.

    `haystacks` sequences of the text, cut to `length`, hold a needle of `needle` tokens at `depths` places each and end
    with its first `cue` tokens; the rest is to be told. Runs with a recall above `recall` count; if none does, all
    scores are 0. The grid `recall` has that of every run.
    """

    card: ClassVar[Card]

    haystacks: int = 4
    depths: int = 3
    needle: int = 16
    cue: int = 4
    length: int = 256
    recall: float = 0.5

    def __post_init__(self) -> None:
        for name in ("haystacks", "depths", "cue"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.cue < self.needle:
            raise ValueError(f"needle must be longer than the cue of {self.cue}, not {self.needle}")
        if self.length < 6:
            raise ValueError(f"length must be at least 6, not {self.length}")
        if not 0 <= self.recall < 1:
            raise ValueError(f"recall must be at least 0 and below 1, not {self.recall:g}")

    def measure(self, lab: Lab) -> Scores:
        """One forward over each haystack and depth."""
        from lamina.lab.lab import decoder

        decoder(lab.anatomy)  # raises for a model that predicts no tokens
        plans = self._plans(lab)
        bench = lab.on([{"input_ids": p.ids} for p in plans])
        bench.counts = lab.counts
        copies = _Copies(plans, lab.anatomy.stacks[0].blocks[-1].site.id)
        bench.stream([copies], "needles", score=False)
        for number, plan in enumerate(plans):
            states = copies.states[number]
            plan.said = bench.decode(states).argmax(-1).view(len(plan.ids), -1).cpu()
        return self._scores(lab, plans, copies)

    def _plans(self, lab: Lab) -> list[_Plan]:
        import torch

        from lamina.lab.probes import noise_of
        from lamina.lab.prompts import prompts

        known = torch.unique(torch.cat([ids.cpu() for ids in prompts(lab)]))
        found = []
        for ids in prompts(lab, self.haystacks, self.length, shortest=6):
            size = min(self.needle, len(ids) // 3)
            noise = noise_of(ids.tolist(), "needle", lab.seed)
            found.append(planted(ids.cpu(), known, size, min(self.cue, size // 2), self.depths, noise))
        return found

    def _scores(self, lab: Lab, plans: list[_Plan], copies: _Copies) -> Scores:
        from lamina.core.scores import Grid, Scores
        from lamina.maths.moments import Mean

        recalls = np.stack([p.recall for p in plans])
        values, errors, missing = {}, {}, {}
        for attention in lab.anatomy.of_kind(Kind.ATTENTION):
            site, why = _heads(lab, attention)
            hits = copies.hits.get(attention.id, [])
            if site is None or len(hits) < len(plans) or hits[0].shape[1] != site.width:
                missing[f"{attention.id}.{Kind.HEAD.value}"] = why or "its attention weights were not seen"
                continue
            mean = Mean()
            for plan, here, recall in zip(plans, hits, recalls, strict=True):
                scores = plan.copied(here)[recall > self.recall]
                mean.add(scores.sum(0, keepdims=True), [len(scores)])
            values[site.id] = mean.value if mean.count else np.zeros(site.width)
            if mean.count:
                errors[site.id] = mean.stderr
        if not (recalls > self.recall).any():
            missing[""] = f"no needle was found again: the largest recall is {recalls.max():.2f}"
        names = tuple(f"sequence {n}" for n in range(len(plans)))
        depths = tuple(f"depth {share:.2f}" for share in _depths(self.depths))
        grid = Grid(values=recalls, rows=names, columns=depths)
        return Scores(measure=self.card.name, values=values, stderr=errors, grids={"recall": grid}, missing=missing)


def _heads(lab: Lab, attention: Site) -> tuple[Site | None, str]:
    """The site of an attention's heads, or why there is none."""
    site = next(iter(lab.anatomy.units(attention, Kind.HEAD)), None)
    why = lab.anatomy.refused_units(attention).get(f"{attention.id}.{Kind.HEAD.value}", "")
    return site, "" if site is not None else why or "its heads were not found"


@dataclass(eq=False)
class _Plan:
    """One haystack with a needle at several depths: `ids` [runs, tokens], and where the needle begins in each run.

    It is `size` tokens long; the tokens that follow the positions `steps` are asked for, and `said` [runs, steps] is
    what the model says there.
    """

    ids: Tensor
    starts: list[int]
    size: int
    steps: Tensor
    said: Tensor | None = None

    @property
    def recall(self) -> np.ndarray:
        """Of each run, the share of the tokens asked for that the model says, in any order."""
        assert self.said is not None
        found = []
        for ids, start, said in zip(self.ids.tolist(), self.starts, self.said.tolist(), strict=True):
            wanted = ids[start + self.size - len(said) : start + self.size]
            met = sum(min(wanted.count(t), said.count(t)) for t in set(wanted))
            found.append(met / len(wanted))
        return np.array(found)

    def copied(self, looked: Tensor) -> np.ndarray:
        """Scores [runs, heads] from the positions [runs, heads, steps] that the largest weights are on."""
        import torch

        assert self.said is not None
        starts = torch.tensor(self.starts).view(-1, 1, 1)
        inside = (looked >= starts) & (looked < starts + self.size)
        same = self.ids.gather(1, looked.flatten(1)).view_as(looked) == self.said.unsqueeze(1)
        return (inside & same).double().mean(-1).numpy()


def _depths(count: int) -> list[float]:
    return [n / (count - 1) if count > 1 else 0.5 for n in range(count)]


def planted(ids: Tensor, known: Tensor, size: int, cue: int, depths: int, noise: object) -> _Plan:
    """A haystack [tokens] with needles of `size` of the `known` ids: each run is as long as the haystack was at most.

    The last `size` - 1 tokens repeat the needle, so that each but its first `cue` tokens is asked for.
    """
    import torch

    hay = ids[: len(ids) - 2 * size + 1]
    runs, starts = [], []
    for share in _depths(depths):
        if len(known) >= size:
            drawn = torch.randperm(len(known), generator=noise)[:size]  # type: ignore[arg-type]
        else:
            drawn = torch.randint(len(known), (size,), generator=noise)  # type: ignore[call-overload]
        needle, start = known[drawn], round(share * len(hay))
        runs.append(torch.cat([hay[:start], needle, hay[start:], needle[:-1]]))
        starts.append(start)
    total = len(runs[0])
    return _Plan(torch.stack(runs), starts, size, torch.arange(total - size + cue, total))


@dataclass(eq=False)
class _Copies:
    """Listens to the planted runs: by attention and run, where each head's largest weight is at every step."""

    plans: list[_Plan]
    last: str
    hits: dict[str, list[Tensor]] = field(default_factory=dict)
    states: list[Tensor] = field(default_factory=list)
    wants: ClassVar[frozenset[str]] = frozenset({"attention"})

    def add(self, site: Site, taps: Taps) -> None:
        """Take in one site on one haystack."""
        import torch

        plan = self.plans[taps.rows.number]
        if site.kind is Kind.ATTENTION and taps.attention is not None:
            found = [taps.attention.weights(r, plan.steps).argmax(-1).cpu() for r in range(len(plan.ids))]
            self.hits.setdefault(site.id, []).append(torch.stack(found))
        if site.id == self.last:
            self.states.append(taps.leaving.unflatten(0, plan.ids.shape)[:, plan.steps].flatten(0, 1))

    def merge(self, other: _Copies) -> _Copies:
        """Never asked for: it listens to one pass."""
        raise TypeError("it listens to one pass")

    def scores(self) -> Scores:
        """Never asked for: the measure has them."""
        raise TypeError("ask the measure")
