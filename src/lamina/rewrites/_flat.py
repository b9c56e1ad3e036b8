"""Which units of flattened blocks stay, on the streams of the flattened network, and what their last maps become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lamina.anatomy.parts import Block
from lamina.core.sites import Kind, Site
from lamina.lab.lab import Lab, real
from lamina.lab.walk import Walk
from lamina.rewrites._wide import tail_of, units_of
from lamina.rewrites.narrow import taken_over

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy


@dataclass(eq=False)
class Sublayer:
    """One position of a run of blocks: the units of each block, how many stay; then which, and the last map
    [outputs, inputs of all blocks] with its bias [outputs], float64.
    """

    units: tuple[Site, ...]
    count: int
    kept: list[tuple[int, int]] = field(default_factory=list)
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def all(self) -> list[tuple[int, int]]:
        """Every unit of every block, in order."""
        return [(j, i) for j, site in enumerate(self.units) for i in range(site.width)]


def sublayers(anatomy: Anatomy, blocks: Sequence[Block], width: float) -> list[Sublayer] | None:
    """The sublayers of a run, `width` times as wide as the first block's; None where some have no units."""
    found = []
    for same in zip(*(b.branches for b in blocks), strict=True):
        units = [units_of(anatomy, branch) for branch in same]
        if any(u is None for u in units):
            return None
        sites = tuple(u for u in units if u is not None)
        found.append(Sublayer(sites, max(1, min(round(width * sites[0].width), len(sites) * sites[0].width))))
    return found


def columns(anatomy: Anatomy, sublayer: Sublayer, kept: Sequence[tuple[int, int]]) -> list[int]:
    """The columns of units among those of all blocks' last maps side by side."""
    runs = [anatomy.columns(site) for site in sublayer.units]
    wide = tail_of(anatomy, sublayer.units[0])[1].shape[1]
    return [j * wide + c for j, i in kept for c in runs[j][i]]


def choose(lab: Lab, place: int, runs: Sequence[tuple[Sequence[Block], list[Sublayer]]], ridge: float) -> None:
    """Fill in what stays of each run, in depth order; one walk through the stack as the flattened network has it."""
    stack = lab.anatomy.stacks[place]
    order = [b.path for b in stack.blocks]
    walk = Walk(lab, (), place)
    for number, (blocks, parts) in enumerate(sorted(runs, key=lambda r: order.index(r[0][0].path))):
        first = order.index(blocks[0].path)
        while walk.at < first:
            walk.step()
        walk.streams = _flattened(lab, walk, first, blocks, parts, ridge)
        walk.at = first + len(blocks)
        lab.progress("flatten", number + 1, len(runs))


@torch.no_grad()
def _flattened(
    lab: Lab, walk: Walk, first: int, blocks: Sequence[Block], parts: Sequence[Sublayer], ridge: float
) -> list[Tensor]:
    """The streams behind a run; its sublayers are chosen one after the other, on what those before leave."""
    entering = list(walk.streams)
    added: list[list[Tensor]] = []
    for position, sublayer in enumerate(parts):
        branch = blocks[0].branches[position]
        stream = [sum((added[p][n] for p in branch.reads), start=x) for n, x in enumerate(entering)]
        wide: list[list[Tensor]] = [[] for _ in entering]
        for j, block in enumerate(blocks):
            walk.at, walk.streams = first + j, list(stream)
            mine = block.branches[position]
            _, inputs = walk.look(mine, [x.site.id for x in block.branches if x is not mine])
            for n, z in enumerate(inputs):
                wide[n].append(z)
        joint = [torch.cat(zs, -1) for zs in wide]
        _choose(lab, sublayer, joint, ridge)
        made = columns(lab.anatomy, sublayer, sublayer.kept)
        assert sublayer.weight is not None
        weight = sublayer.weight[:, made]
        added.append([_mapped(z[..., made], weight, sublayer.bias) * branch.scale for z in joint])
    return [sum((a[n] for a in added), start=x) for n, x in enumerate(entering)]


def _mapped(z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = z @ weight.T.to(z)
    return out if bias is None else out + bias.to(out)


def _choose(lab: Lab, sublayer: Sublayer, joint: Sequence[Tensor], ridge: float) -> None:
    """The units of the highest scores, and the last map of all blocks side by side, its neurons' made up for."""
    maps = [tail_of(lab.anatomy, site) for site in sublayer.units]
    weight = torch.cat([w.double() for _, w, _ in maps], 1)
    biases = [b.detach().double() for _, _, b in maps if b is not None]
    sublayer.bias = sum(biases[1:], start=biases[0]) if biases else None
    sublayer.weight, sublayer.kept = weight, sublayer.all
    if sublayer.count == len(sublayer.all):
        return
    neurons = sublayer.units[0].kind is Kind.NEURON
    moment = _moment(lab, joint, whole=neurons)
    if neurons:
        scores, level = leverage(moment, ridge)
        scores = scores[columns(lab.anatomy, sublayer, sublayer.all)]
        sublayer.kept = _best(sublayer, scores)
        mine = set(sublayer.kept)
        gone = columns(lab.anatomy, sublayer, [u for u in sublayer.all if u not in mine])
        rest = [c for c in range(len(moment)) if c not in set(gone)]
        mean = float(moment.diagonal()[rest].mean())
        sublayer.weight = taken_over(weight, moment, gone, level / max(mean, 1e-300))
    else:
        energy = moment * weight.square().sum(0)
        per = [energy[columns(lab.anatomy, sublayer, [u])].sum() for u in sublayer.all]
        sublayer.kept = _best(sublayer, torch.stack(per).sqrt())


def _best(sublayer: Sublayer, scores: Tensor) -> list[tuple[int, int]]:
    """The units of the highest scores, in their own order."""
    order = sorted(range(len(scores)), key=lambda n: (-float(scores[n]), n))
    return [sublayer.all[n] for n in sorted(order[: sublayer.count])]


def leverage(moment: Tensor, ridge: float) -> tuple[Tensor, float]:
    """diag C (C + λ)⁻¹ of C = E[z zᵀ], and λ, `ridge` times C's mean singular value; float64."""
    level = ridge * float(moment.diagonal().mean())
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    solved = torch.linalg.solve(moment + max(level, 1e-300) * eye, moment)
    return solved.diagonal(), level


def _moment(lab: Lab, joint: Sequence[Tensor], *, whole: bool) -> Tensor:
    """E[z zᵀ] over the text's tokens, float64, on the CPU; of it the diagonal alone where not the `whole` is asked."""
    total: Any = 0.0
    tokens = 0
    for z, batch in zip(joint, lab.batches, strict=True):
        rows = z[real(batch).to(z.device)].float()
        total = total + ((rows.T @ rows).double() if whole else rows.double().square().sum(0)).cpu()
        tokens += len(rows)
    return total / max(tokens, 1)
