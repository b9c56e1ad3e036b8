"""Refit: the last linear map before a gap learns, in closed form, what the gone sites added."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lamina.core.documents import Receipt, Step
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import rewrite
from lamina.core.sites import SUBLAYERS
from lamina.rewrites.drop import Problem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lamina.anatomy import Anatomy
    from lamina.anatomy.parts import Stack
    from lamina.core.sites import Cost
    from lamina.lab import Lab

PAPER = Paper(
    key="shopkhoev2025replaceme",
    title="ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization",
    authors=(
        "Dmitriy Shopkhoev",
        "Ammar Ali",
        "Magauiya Zhussip",
        "Valentin Malykh",
        "Stamatios Lefkimmiatis",
        "Nikos Komodakis",
        "Sergey Zagoruyko",
    ),
    year=2025,
    arxiv="2505.02819",
)


@rewrite(
    "refit",
    PAPER,
    on=tuple(sorted(SUBLAYERS)),
    needs=Need.FORWARD,
    status="stable",
    deviations=(
        "fitted on the inputs of a branch's last linear map, not on its output; the map itself changes",
        "every map from the first gap on is fitted, in depth order, on the streams of the thinned network itself",
        "the target is the dense stream after the gap that follows; rows are weighted by 1/‖target‖²",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Refit:
    """Let the last linear maps of what stays make up for what goes, in closed form, by ridge least squares.

    For each branch in depth order, with Z the inputs of its last map [tokens, features] and x the stream after it
    [tokens, width] in the thinned network, and y the dense stream after it and after the gone sites that follow it:
    W += argmin_D Σ_t ‖y_t - x_t - D Z_t‖² / ‖y_t‖² + ridge · mean(diag G) ‖D‖², G = Σ_t Z_t Z_tᵀ / ‖y_t‖².
    No new parameters, no gradients; one dense and at most one thinned pass over the text, where the branches of a
    block follow each other (a second thinned one where they are parallel).
    """

    card: ClassVar[Card]

    def check(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What stands in the way; needs no weights."""
        known = {s.id for s in anatomy.sublayers}
        problems = [Problem(s, "the model has no such sublayer") for s in step.sites if s not in known]
        if not step.sites or "around" not in step.options:
            what = "the step names no sites, or no gap"
            problems.append(Problem("refit", what, "options: {around: [sites to be dropped]}"))
        return problems or [
            Problem(s, "the branch does not end in a linear map", "drop without refitting")
            for s in step.sites
            if not _fits(anatomy, s)
        ]

    def forecast(self, step: Step, anatomy: Anatomy) -> Cost:
        """The same as before: shapes stay."""
        return anatomy.total()

    def apply(self, step: Step, lab: Lab) -> Receipt:
        """Change the maps of `step.sites` in place, for the network without `options["around"]`.

        Runs before the sites around are dropped, on the lab's calibration text.
        """
        for problem in self.check(step, lab.anatomy):
            raise problem.error()
        ridge = float(step.options.get("ridge", RIDGE))
        gone = lab.anatomy.expand(step.options["around"])
        for place in range(len(lab.anatomy.stacks)):
            _refit(lab, place, frozenset(step.sites), gone, ridge)
        total = lab.anatomy.total()
        return Receipt(rewrite="refit", sites=step.sites, before=total, after=total, options=step.options)

    def replay(self, receipt: Receipt, skeleton: nn.Module, anatomy: Anatomy | None = None) -> None:
        """Nothing to rebuild: the structure is the same, the numbers come with the weights."""

    @staticmethod
    def examples(anatomy: Anatomy) -> tuple[Step, ...]:
        """Steps that the conformance suite tries: one block gone, then the last branches of two."""
        blocks = [b.site.id for b in anatomy.stacks[0].blocks]
        gaps = ([blocks[2]], [anatomy.parts(b)[-1].id for b in blocks[1:3]])
        return tuple(
            Step(rewrite="refit", sites=sites, options={"around": gone})
            for gone in gaps
            if (sites := refit_sites(anatomy, gone))
        )


RIDGE = 0.3
"""Relative to the mean of the Gram matrix's diagonal."""


def refit_sites(anatomy: Anatomy, gone: Iterable[str]) -> tuple[str, ...]:
    """The branches that a refit around `gone` changes, if they end in a linear map: in each stack the last one before
    the first gap, and all kept after it.
    """
    out = anatomy.expand(gone)
    found: list[str] = []
    for stack in anatomy.stacks:
        order = [x.site.id for b in stack.blocks for x in b.branches]
        first = next((n for n, s in enumerate(order) if s in out), len(order))
        if first < len(order):
            found += [s for s in order[max(first - 1, 0) :] if s not in out and _fits(anatomy, s)]
    return tuple(found)


def _fits(anatomy: Anatomy, site: str) -> bool:
    """Whether the branch ends in a linear map, in a stack whose blocks only add to their stream."""
    return bool(anatomy.branch(site).tail) and all(b.plain for b in anatomy.stack(site).blocks)


class _Targets:
    """The dense streams after any branch; walks ahead of the thinned network, block by block."""

    def __init__(self, lab: Lab, place: int) -> None:
        from lamina.lab.walk import Walk

        self.walk = Walk(lab, (), place)
        self._held: dict[int, tuple[list[Tensor], list[dict[str, Tensor]]]] = {}

    def entering(self, block: int) -> list[Tensor]:
        """Per batch, the stream that enters the block; what lies before can't be asked for any more."""
        while self.walk.at < block:
            self.walk.step()
        return list(self.walk.streams)

    def after(self, block: int, position: int) -> list[Tensor]:
        """Per batch, the stream that the block entered with plus what its first `position` + 1 branches added."""
        while self.walk.at <= block:
            at, entering = self.walk.at, list(self.walk.streams)
            self._held[at] = (entering, self.walk.step()[0])
        entering, added = self._held[block]
        upto = [x.site.id for x in self.walk.stack.blocks[block].branches[: position + 1]]
        return [sum((a[s] for s in upto), start=x) for x, a in zip(entering, added, strict=True)]

    def forget(self, before: int) -> None:
        """Let go of the blocks before this one."""
        for block in [b for b in self._held if b < before]:
            del self._held[block]


def _refit(lab: Lab, place: int, sites: frozenset[str], gone: frozenset[str], ridge: float) -> None:
    """One stack, in depth order; up to the first site that matters the two networks are one."""
    from lamina.lab.walk import Walk

    stack = lab.anatomy.stacks[place]
    first = min((n for n, b in enumerate(stack.blocks) for x in b.branches if x.site.id in sites | gone), default=None)
    if first is None:
        return
    thin, dense = Walk(lab, gone, place), _Targets(lab, place)
    thin.streams, thin.at = dense.entering(first), first
    for number, block in enumerate(stack.blocks[first:], first):
        lab.progress("refit", number + 1, len(stack.blocks))
        dense.forget(number)
        in_turn = all(x.reads == tuple(range(i)) for i, x in enumerate(block.branches))
        for position, branch in enumerate(block.branches):
            fitted = branch.site.id in sites - gone
            if not fitted and not in_turn:
                continue
            others = block.branches[:position] if in_turn else ()
            without = [x.site.id for x in (*others, *block.branches[position + 1 :])]
            streams, inputs = thin.look(branch, without)
            if fitted:
                target = dense.after(*_gap(stack, gone, number, position))
                change = _solve(lab, inputs, target, streams, ridge) / branch.scale
                made = add_to_map(lab.model.get_submodule(f"{block.path}.{branch.tail}"), change) * branch.scale
                streams = [x + z @ made.to(z.dtype) for x, z in zip(streams, inputs, strict=True)]
            if in_turn:
                thin.streams = streams
        if in_turn:
            thin.skip()
        else:
            thin.step()


def _gap(stack: Stack, gone: frozenset[str], number: int, position: int) -> tuple[int, int]:
    """(block, position) of the last branch of the gap behind a branch; its own where nothing there goes."""
    places = [(n, i, x.site.id) for n, b in enumerate(stack.blocks) for i, x in enumerate(b.branches)]
    end = next(at for at, (n, i, _) in enumerate(places) if (n, i) == (number, position))
    while end + 1 < len(places) and places[end + 1][2] in gone:
        end += 1
    return places[end][:2]


def _solve(lab: Lab, inputs: list[Tensor], target: list[Tensor], streams: list[Tensor], ridge: float) -> Tensor:
    """The correction [features, width], float32; a batch is summed in the streams' own type, batches in float64."""
    import torch

    from lamina.lab.lab import real

    gram: Any = 0.0
    moment: Any = 0.0
    for z, y, x, batch in zip(inputs, target, streams, lab.batches, strict=True):
        keep = real(batch).to(z.device)
        zf, yf, xf = (t[keep].float() for t in (z, y, x))
        size = yf.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        left, right = (zf / size).to(z.dtype), ((yf - xf) / size).to(z.dtype)
        gram = gram + (left.T @ left).double()
        moment = moment + (left.T @ right).double()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    level = (ridge * gram.diagonal().mean()).clamp_min(1e-30)
    return torch.linalg.solve(gram + level * eye, moment).float()


def add_to_map(module: nn.Module, change: Tensor) -> Tensor:
    """Add `change` [in, out] to the weights of a linear map: stored [out, in] by nn.Linear, [in, out] by Conv1D.

    Returns what was really added [in, out], float32: weights of few bits round it.
    """
    import torch

    weight: Any = module.weight
    with torch.no_grad():
        linear, before = isinstance(module, torch.nn.Linear), weight.float().clone()
        weight.copy_((before + (change.T if linear else change)).to(weight.dtype))
        made = weight.float() - before
    return made.T if linear else made


@contextmanager
def kept_weights(lab: Lab, sites: Iterable[str]) -> Iterator[None]:
    """Inside, the branches' last maps may be refitted on trial; afterwards they are as before."""
    import torch

    maps: list[Any] = [
        lab.model.get_submodule(f"{lab.anatomy.block(s).path}.{lab.anatomy.branch(s).tail}")
        for s in dict.fromkeys(sites)
    ]
    before = [m.weight.detach().clone() for m in maps]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, weight in zip(maps, before, strict=True):
                module.weight.copy_(weight)
