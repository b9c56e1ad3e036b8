"""Task-loss matching: a map trained on the loss stands for a block too well, by states that the network never sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.scores import Array, Grid, Scores
from lamina.core.sites import Kind
from lamina.maths.moments import Mean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lamina.lab import Lab
    from lamina.lab.resume import Map, Resumed

PAPER = Paper(
    key="balogh2024stitch",
    title="How not to Stitch Representations to Measure Similarity: Task Loss Matching versus Direct Matching",
    authors=("András Balogh", "Márk Jelasity"),
    year=2024,
    arxiv="2412.11299",
)


@measure(
    "task-matching",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.GRADIENT,
    deviations=(
        "from a block's input to its output; the paper matches layers of two networks",
        "the task is the next token; maps are fitted and trained on the first half of each sequence and judged on the "
        "second, all at once: a few steps in the place of 30 epochs, a tenth of the paper's learning rate",
        "the first map is a ridge regression of what the block adds; the paper takes the pseudo-inverse",
    ),
)
@dataclass(frozen=True, kw_only=True)
class TaskMatching:
    """The rise of the loss with an affine map in the block's place that was trained on the loss, in nats per token.

    The map begins as the direct match (ridge regression on the states) and takes `steps` Adam steps of `learning_rate`.
    As a measure of likeness it is the paper's warning: grid `matching` sets it beside the direct match: the rises, and
    the distance ‖mapped - leaving‖² / ‖leaving‖² before and after training, all on the second halves of the sequences.
    Where training lowers the rise and raises the distance, the likeness is a fake. Few tokens: `sequences`, `length`.
    """

    card: ClassVar[Card]

    steps: int = 3
    learning_rate: float = 1e-4
    ridge: float = 0.1
    sequences: int | None = 8
    length: int | None = 32

    known_failures: ClassVar[Mapping[str, str]] = {
        "check_errors_are_over_sequences": "eight sequences are run, however many there are, and errors take maps as "
        "known"
    }

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps is at least 0, not {self.steps}")
        for name in ("learning_rate", "ridge"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is above 0, not {getattr(self, name):g}")
        for name in ("sequences", "length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is at least 1, not {value}")

    def measure(self, lab: Lab) -> Scores:
        """Of each block, a fit and some partial forwards and backwards."""
        from lamina.lab.resume import Resumed, few

        part = few(lab, self.sequences, self.length)
        runs = [Resumed(part, rows) for rows in part.rows()]
        dense = [_late(run, run.out) for run in runs]
        values, errors, table = {}, {}, {}
        for done, block in enumerate(runs[0].order):
            weights = _direct(runs, block, self.ridge)
            direct = _judged(runs, block, weights, dense)
            start = _distance(runs, block, weights)
            self._train(runs, block, weights)
            trained = _judged(runs, block, weights, dense)
            values[block], errors[block] = np.atleast_1d(trained.value), np.atleast_1d(trained.stderr)
            table[block] = [float(direct.value), float(trained.value), start, _distance(runs, block, weights)]
            lab.progress("trained maps", done + 1, len(runs[0].order))
        return Scores(measure=self.card.name, values=values, stderr=errors, grids=_grids(lab, table))

    def _train(self, runs: Sequence[Resumed], block: str, weights: Sequence[Tensor]) -> None:
        """A few full-batch steps on the loss of the sequences' first halves."""
        import torch

        from lamina.lab.gradients import frozen

        optimizer = torch.optim.Adam(list(weights), lr=self.learning_rate, weight_decay=1e-5)
        count = max(sum(float(_early(run, run.out)[1].sum()) for run in runs), 1.0)
        for _ in range(self.steps):
            made = [torch.zeros_like(w) for w in weights]
            for run in runs:
                with frozen(run.lab.model), torch.enable_grad():
                    leaves = [w.clone().requires_grad_() for w in weights]
                    loss = _early(run, run.forward(block, {block: _map(leaves)}))[0].sum() / count
                    made = [a + g for a, g in zip(made, torch.autograd.grad(loss, leaves), strict=True)]
                run.lab.counts.backwards += run.later(block) * int(run.rows.mask.sum())
            for weight, gradient in zip(weights, made, strict=True):
                weight.grad = gradient
            optimizer.step()


def _map(weights: Sequence[Tensor]) -> Map:
    w, c = weights
    return lambda x: x + (x.float() @ w + c).to(x.dtype)


def _halves(run: Resumed) -> Tensor:
    """The index of the first prediction of each sequence's second half [sequences, 1]."""
    return (run.rows.mask.sum(1, keepdim=True) - 1) // 2


def _losses(run: Resumed, out: Tensor, late: bool) -> tuple[Tensor, Tensor]:
    import torch

    from lamina.lab.objective import token_losses

    run.expect_losses()
    found, valid = token_losses(out, run.rows.batch)
    place = torch.cumsum(valid.long(), 1) - 1
    mine = valid & ((place >= _halves(run).to(place.device)) == late)
    return (found * mine).sum(1), mine.sum(1).double()


def _early(run: Resumed, out: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and counts of the losses of the sequences' first halves, float64 [sequences]."""
    return _losses(run, out, late=False)


def _late(run: Resumed, out: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the second halves, of which each sequence has one prediction at least."""
    return _losses(run, out, late=True)


def _states(run: Resumed, block: str, late: bool) -> tuple[Tensor, Tensor]:
    """The streams before and behind a block at the tokens of one half, float64 [tokens, width]."""
    import torch

    rows = run.rows_at(block)
    sizes = torch.bincount(rows.sequence, minlength=rows.sequences)
    half = (rows.position >= (sizes // 2)[rows.sequence]) == late
    x, y = rows.strip(run.entering[block]).double(), rows.strip(run.leaving[block]).double()
    return x[half.to(x.device)], y[half.to(y.device)]


def _direct(runs: Sequence[Resumed], block: str, ridge: float) -> list[Tensor]:
    """Weights [width, width] and constant [width] of the map of what the block adds, float32."""
    import torch

    from lamina.maths.affine import affine

    parts = [_states(run, block, late=False) for run in runs]
    x, y = (torch.cat(p) for p in zip(*parts, strict=True))
    return [w.float() for w in affine(x, y - x, ridge)]


def _distance(runs: Sequence[Resumed], block: str, weights: Sequence[Tensor]) -> float:
    import torch

    parts = [_states(run, block, late=True) for run in runs]
    x, y = (torch.cat(p) for p in zip(*parts, strict=True))
    guess = x + x @ weights[0].detach().double() + weights[1].detach().double()
    return float((guess - y).square().sum() / y.square().sum().clamp_min(1e-300))


def _judged(
    runs: Sequence[Resumed], block: str, weights: Sequence[Tensor], dense: Sequence[tuple[Tensor, Tensor]]
) -> Mean:
    """The rise of the second halves' loss with the map in the block's place."""
    import torch

    mean = Mean()
    for run, (usual, count) in zip(runs, dense, strict=True):
        with torch.no_grad():
            sums, _ = _late(run, run.forward(block, {block: _map(weights)}))
        mean.add((sums - usual).cpu().numpy(), count.cpu().numpy())
    return mean


def _grids(lab: Lab, table: Mapping[str, list[float]]) -> dict[str, Grid]:
    columns = ("direct", "trained", "distance of the direct", "distance of the trained")
    grids = {}
    for stack in lab.anatomy.stacks:
        blocks = tuple(b.site.id for b in stack.blocks)
        values: Array = np.array([table[b] for b in blocks])
        prefix = blocks[0].rpartition("block.")[0]
        grids[f"{prefix}matching"] = Grid(values=values, rows=blocks, columns=columns)
    return grids
