"""On residual network depth: the stream as a sum over paths, sorted by how many blocks they pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.scores import Grid, Scores
from lamina.core.sites import Kind
from lamina.maths.moments import Mean

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from lamina.lab import Lab
    from lamina.lab.rows import Rows

PAPER = Paper(
    key="dherin2025depth",
    title="On residual network depth",
    authors=("Benoit Dherin", "Michael Munn"),
    year=2025,
    arxiv="2510.03470",
)
SCORES = ("paths", "update")


@measure(
    "path-orders",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.GRADIENT,
    deviations=(
        "the paper proves the expansion; the procedure, with Jacobians where the stream really is, is inferred",
        "what a block adds beyond its Jacobian times its input, nothing in a linear network, begins paths of order "
        "one, so that the orders add up to the stream",
        "the paper scores no blocks",
    ),
)
@dataclass(frozen=True, kw_only=True)
class PathOrders:
    """Keep blocks that much of the output's paths go through, each block linear as it is at its own input.

    With y = x + f(x), c = f(x) - Jx and J the Jacobian of f at x, the last stream is the sum of paths from the first
    stream, and from every c, through some of the J. `score`: "paths", ‖all paths through the block‖ / ‖last stream‖,
    or "update", ‖Jx‖ / ‖x‖, which a norm before f makes small, as f hardly changes along x; means over tokens. Few
    tokens (`sequences`, `length`): L² products of a Jacobian with a vector. Grids: `orders`, of each number of blocks
    passed, the size of its paths relative to the last stream, and their share; `length`, their mean order (effective
    path length); `blocks`, both scores.
    """

    card: ClassVar[Card]

    score: str = "paths"
    sequences: int = 4
    length: int = 16

    known_failures: ClassVar[Mapping[str, str]] = {
        "check_errors_are_over_sequences": "work grows with the depth squared: four sequences are run, however many"
    }

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"score is one of {', '.join(SCORES)}, not {self.score!r}")
        for name in ("sequences", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")

    def measure(self, lab: Lab) -> Scores:
        """One forward, and about L² products of a block's Jacobian with a vector."""
        from lamina.lab.resume import few

        part = few(lab, self.sequences, self.length)
        found: dict[str, dict[str, Mean]] = {}
        for number, rows in enumerate(part.rows()):
            for stack, columns in _batch(part, rows).items():
                for name, (values, counts) in columns.items():
                    found.setdefault(stack, {}).setdefault(name, Mean()).add(values, counts)
            part.progress("path orders", number + 1, len(part.batches))
        values, errors, grids = {}, {}, {}
        for stack in part.anatomy.stacks:
            blocks = tuple(b.site.id for b in stack.blocks)
            means = found[stack.name]
            values |= {b: np.atleast_1d(v) for b, v in zip(blocks, means[self.score].value, strict=True)}
            errors |= {b: np.atleast_1d(e) for b, e in zip(blocks, means[self.score].stderr, strict=True)}
            grids |= _grids(blocks, means)
        return Scores(measure=self.card.name, values=values, stderr=errors, grids=grids)


def _grids(blocks: Sequence[str], means: Mapping[str, Mean]) -> dict[str, Grid]:
    sizes = means["orders"].value
    share = sizes / max(sizes.sum(), 1e-300)
    orders = tuple(str(k) for k in range(len(sizes)))
    both = np.stack([means[name].value for name in SCORES], 1)
    prefix = blocks[0].rpartition("block.")[0]
    length = np.array([[share @ np.arange(len(sizes))]])
    return {
        f"{prefix}orders": Grid(values=np.stack([sizes, share], 1), rows=orders, columns=("size", "share")),
        f"{prefix}length": Grid(values=length, rows=("all paths",), columns=("effective path length",)),
        f"{prefix}blocks": Grid(values=both, rows=tuple(blocks), columns=SCORES),
    }


def _batch(lab: Lab, rows: Rows) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """By stack, per-sequence sums of "orders" [L + 1], "paths" and "update" [L], and counts of tokens."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from lamina.lab.feed import side_of
    from lamina.lab.gradients import frozen, graph_recorded

    found = {}
    with frozen(lab.model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused kernels have one derivative
        with graph_recorded(lab.model, lab.anatomy) as passed:
            lab.result(rows.batch)
        for stack in lab.anatomy.stacks:
            mine = [p for p in passed if lab.anatomy.stack(p.block.site).name == stack.name]
            steps = [(p.entering, p.leaving) for p in mine if p.leaving is not None]
            own = rows.of(side_of(lab.anatomy, stack.blocks[0])).on(mine[0].entering)
            orders, through, updates = expanded(steps)
            last = steps[-1][1].detach().double()
            first = [x.detach().double() for x, _ in steps]
            found[stack.name] = {
                "orders": _sizes(orders, [last] * len(orders), own),
                "paths": _sizes(through, [last] * len(through), own),
                "update": _sizes(updates, first, own),
            }
    lab.counts.backwards += int(rows.mask.sum()) * lab.depth * (lab.depth + 1)
    return found


def expanded(steps: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Paths by order, paths through each block, and Jx of each, float64 tensors like the stream.

    `steps` are the stream before and behind each block, the latter in the graph of the former, with two derivatives.
    The paths of all orders add up to the last stream.
    """
    paths = [steps[0][0].detach().double()]
    through: list[Tensor] = []
    updates: list[Tensor] = []
    for x, y in steps:
        product = _jacobian(x, y)
        along = product(x.detach().double())
        added = y.detach().double() - x.detach().double()
        moved = [product(p) for p in paths]
        moved[0] = moved[0] + (added - along)
        paths = [paths[0], *(p + m for p, m in zip(paths[1:], moved, strict=False)), moved[-1]]
        through = [t + product(t) for t in through] + [added]
        updates.append(along)
    return paths, through, updates


def _jacobian(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """v → J v of what is added, y - x, by differentiating its transposed product, which is linear in its vector."""
    import torch

    vector = torch.zeros_like(y, requires_grad=True)
    (transposed,) = torch.autograd.grad(y, x, vector, create_graph=True)

    def product(v: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(transposed, vector, v.to(x.dtype), retain_graph=True)
        return found.double() - v

    return product


def _sizes(parts: Sequence[Tensor], wholes: Sequence[Tensor], rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Sums over each sequence's tokens of ‖part‖ / ‖whole‖ [sequences, parts], and counts of tokens."""
    import torch

    mask = rows.mask.double()
    found = []
    for part, whole in zip(parts, wholes, strict=True):
        ratio = part.norm(dim=-1) / whole.norm(dim=-1).clamp_min(1e-300)
        found.append((ratio.reshape(mask.shape).cpu() * mask).sum(1))
    return torch.stack(found, 1).numpy(), mask.sum(1).numpy()
