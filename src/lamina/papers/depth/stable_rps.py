"""STABLE-RPS: weights are looked up in one shared array, each map's times a number of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lamina.core.papers import Card, Paper
from lamina.core.registry import rewrite
from lamina.core.sites import SUBLAYERS, Kind
from lamina.rewrites.share import Groups, Made, Sharing

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.core.documents import Step
    from lamina.lab import Lab

PAPER = Paper(
    key="desai2023defense",
    title="In defense of parameter sharing for model-compression",
    authors=("Aditya Desai", "Anshumali Shrivastava"),
    year=2023,
    arxiv="2310.11611",
)


@rewrite(
    "stable-rps",
    PAPER,
    on=(Kind.BLOCK, *sorted(SUBLAYERS)),
    deviations=(
        "the paper draws an untrained network from hashed places of an array, then trains it; a trained one does not "
        "outlive that: of k weights in one place about 1/k of their squares is kept; so no hashes, and no signs",
        "instead each map is a partition of the array, and all of a group begin at its first number, so that depths "
        "share their maps; the paper's are the scales, ours the least squares",
        "the array has as many numbers as one map of a group; no other compression can be asked for",
        "nothing is trained, so that gradients need no scaler",
    ),
)
@dataclass(frozen=True, kw_only=True)
class StableRps(Sharing):
    """The maps of a group are one array ψ times a scale of each depth: W_l ≈ λ_l ψ, λ_l the root mean square of W_l.

    ψ = Σ_l λ_l W_l / Σ_l λ_l² is the best by least squares. `group` sites of the step, one after the other, share
    their maps; 0: all of them.
    """

    card: ClassVar[Card]

    def spec(self, anatomy: Anatomy, site: str) -> Mapping[str, Any]:
        """The shared map times a number."""
        return {"type": "scaled"}

    def common(self, maps: Sequence[Tensor]) -> Tensor:
        """ψ, float64."""
        import torch

        sizes = torch.tensor(scales(maps), dtype=torch.float64, device=maps[0].device)
        total = torch.einsum("k,koi->oi", sizes, torch.stack([w.double() for w in maps]))
        return total / sizes.square().sum().clamp_min(1e-300)

    def made(self, step: Step, lab: Lab, groups: Groups) -> Made:
        """ψ, and each depth's λ."""
        import torch

        found = {}
        for held, common in self.shared(lab.anatomy, groups):
            for (path, _), size in zip(held.items(), scales(list(held.values())), strict=True):
                found[path] = {"base.weight": common, "gain": torch.tensor([size])}
        return found


def scales(maps: Sequence[Tensor]) -> list[float]:
    """The root mean square of each map."""
    return [float(w.double().square().mean().sqrt()) for w in maps]
