"""When Does Sparsity Mitigate the Curse of Depth: the loss with two layers exchanged, or with one made affine."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.scores import Array, Grid, Scores
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from lamina.lab import Lab
    from lamina.lab.resume import Map, Resumed

PAPER = Paper(
    key="muhtar2026sparsity",
    title="When Does Sparsity Mitigate the Curse of Depth in LLMs",
    authors=(
        "Dilxat Muhtar",
        "Xinyuan Song",
        "Sebastian Pokutta",
        "Max Zimmer",
        "Nico Pelleriti",
        "Thomas Hofmann",
        "Shiwei Liu",
    ),
    year=2026,
    arxiv="2603.15389",
)
Chosen = NDArray[np.bool_]
GROUPS = 64
"""Of the jackknife: no more sequences than that are run by default, so that each is left out by itself."""


def _expect_some(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} is at least 1, not {count}")


@measure(
    "permutation",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.ABLATION,
    status="stable",
    deviations=(
        "pairs at most `reach` apart change places; the paper takes all pairs",
        "the paper sums pairs up for the network; a block is scored by the mean over its own pairs",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Permutation:
    """Keep blocks whose place matters: |loss - loss with two blocks exchanged| / loss, averaged over its neighbours.

    All parameters of the two change places. Pairs at most `reach` apart are tried, on the first `length` tokens of
    `sequences` sequences (None takes all). Blocks built in other ways than all in reach have no score. Grid `pairs`: P.
    """

    card: ClassVar[Card]

    reach: int = 1
    sequences: int | None = 32
    length: int | None = 32

    known_failures: ClassVar[Mapping[str, str]] = {
        "check_identity_block_is_lowest": "beside an identity block, the last block changes places for free as well"
    }

    def __post_init__(self) -> None:
        _expect_some(reach=self.reach, sequences=self.sequences, length=self.length)

    def measure(self, lab: Lab) -> Scores:
        """A partial forward per pair."""
        from lamina.lab.resume import few

        return _permutation(self.card.name, few(lab, self.sequences, self.length), self.reach)


@measure(
    "usefulness",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.ABLATION,
    status="stable",
    deviations=(
        "maps are fitted by ridge to what a block adds, each to all sequences but the one that it is judged on; the "
        "code fits and judges on the same tokens",
        "the paper reports the share of layers above a threshold; a block is scored by its own ratio",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Usefulness:
    """Keep blocks that no affine map replaces: loss with the best affine map in the block's place, over the loss.

    The first `length` tokens of `sequences` sequences (None takes all); `ridge`: see `lamina.maths.affine`.
    A block counts as useful above the ratio `threshold`. Grid `usefulness`: per block both losses, ratio, and whether
    it is useful.
    """

    card: ClassVar[Card]

    sequences: int | None = 32
    length: int | None = 64
    ridge: float = 0.1
    threshold: float = 1.1

    def __post_init__(self) -> None:
        _expect_some(sequences=self.sequences, length=self.length)
        if self.ridge <= 0:
            raise ValueError(f"ridge is above 0, not {self.ridge:g}")

    def measure(self, lab: Lab) -> Scores:
        """A fit and a partial forward per block."""
        from lamina.lab.resume import few

        return _usefulness(self.card.name, few(lab, self.sequences, self.length), self.ridge, self.threshold)


def _permutation(measure: str, lab: Lab, reach: int) -> Scores:
    """The score of every block that has a like one in reach, and P of all pairs."""
    import torch

    from lamina.lab.resume import Resumed

    stacks = [[b.site.id for b in k.blocks] for k in lab.anatomy.stacks]
    for stack in lab.anatomy.stacks:
        stack.expect_unlooped("its blocks can't change places")
    pairs = [(a, b) for s in stacks for n, a in enumerate(s) for b in s[n + 1 : n + 1 + reach] if _alike(lab, a, b)]
    rows: dict[object, list[Array]] = {key: [] for key in ("dense", "count", *pairs)}
    for number, batch in enumerate(lab.rows()):
        resumed = Resumed(lab, batch)
        dense, count = resumed.losses(resumed.out)
        rows["dense"].append(dense.cpu().numpy())
        rows["count"].append(count.cpu().numpy())
        for pair in pairs:
            with torch.no_grad(), _exchanged(*(lab.model.get_submodule(lab.anatomy.block(b).path) for b in pair)):
                start = min(pair, key=resumed.order.index)
                rows[pair].append(resumed.losses(resumed.forward(start))[0].cpu().numpy())
        lab.progress("exchanged blocks", number + 1, len(lab.batches))
    sums = {key: np.concatenate(parts) for key, parts in rows.items()}
    return _of_pairs(measure, stacks, pairs, sums)


def _of_pairs(
    measure: str, stacks: Sequence[Sequence[str]], pairs: Sequence[tuple[str, str]], sums: Mapping[object, Array]
) -> Scores:
    """Scores from sums of losses [sequences]."""
    from lamina.maths.jackknife import jackknife

    dense, sequences = sums["dense"], np.arange(len(sums["dense"]))
    effects = {p: abs(sums[p].sum() / dense.sum() - 1) for p in pairs}
    values, errors, missing, grids = {}, {}, {}, {}
    for blocks in stacks:
        table = np.zeros((len(blocks), len(blocks)))
        for number, block in enumerate(blocks):
            mine = [p for p in pairs if block in p]
            if not mine:
                missing[block] = "no block in reach is built like it"
                continue
            losses = np.stack([sums[p] for p in mine])

            def mean(rows: Chosen, losses: Array = losses) -> Array:
                return np.abs(losses[:, rows].sum(1) / dense[rows].sum() - 1).mean()

            value, error = jackknife(mean, sequences, GROUPS)
            values[block], errors[block] = np.atleast_1d(value), np.atleast_1d(error)
            for a, b in mine:
                table[number, blocks.index(b if a == block else a)] = effects[a, b]
        grids[f"{_prefix(blocks)}pairs"] = Grid(values=table, rows=tuple(blocks), columns=tuple(blocks))
    return Scores(measure=measure, values=values, stderr=errors, missing=missing, grids=grids)


def _alike(lab: Lab, one: str, other: str) -> bool:
    """Whether two blocks have the same parameters, by name, shape and type."""
    shapes = [
        {n: (p.shape, p.dtype) for n, p in lab.model.get_submodule(lab.anatomy.block(b).path).named_parameters()}
        for b in (one, other)
    ]
    return shapes[0] == shapes[1]


@contextmanager
def _exchanged(one: nn.Module, other: nn.Module) -> Iterator[None]:
    """Inside, two modules have each other's parameters; nothing is copied."""
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))

    def swap() -> None:
        for a, b in pairs:
            a.data, b.data = b.data, a.data

    swap()
    try:
        yield
    finally:
        swap()


def _usefulness(measure: str, lab: Lab, ridge: float, threshold: float) -> Scores:
    """Loss ratios with an affine map, fitted to all other sequences, in the place of each block."""
    import torch

    from lamina.lab.resume import Resumed

    runs = [Resumed(lab, rows) for rows in lab.rows()]
    dense, count = _joined([r.losses(r.out) for r in runs])
    mapped: dict[str, Array] = {}
    for done, block in enumerate(runs[0].order):
        guesses = _guessed(runs, block, ridge)
        with torch.no_grad():
            outs = [r.forward(block, {block: _adds(g)}) for r, g in zip(runs, guesses, strict=True)]
        mapped[block] = _joined([r.losses(o) for r, o in zip(runs, outs, strict=True)])[0]
        lab.progress("affine maps", done + 1, len(runs[0].order))
    values, errors, grids = {}, {}, {}
    for block, sums in mapped.items():
        values[block], errors[block] = _ratio(sums, dense)
    for stack in lab.anatomy.stacks:
        blocks = tuple(b.site.id for b in stack.blocks)
        ratios = np.array([values[b][0] for b in blocks])
        means = np.array([mapped[b].sum() for b in blocks]) / count.sum()
        whole = np.full(len(blocks), dense.sum() / count.sum())
        table = np.stack([whole, means, ratios, ratios > threshold], 1).astype(np.float64)
        columns = ("loss", "mapped loss", "ratio", "useful")
        grids[f"{_prefix(blocks)}usefulness"] = Grid(values=table, rows=blocks, columns=columns)
    return Scores(measure=measure, values=values, stderr=errors, grids=grids)


def _adds(guess: Tensor) -> Map:
    return lambda stream: stream + guess.to(stream.dtype)


def _guessed(runs: Sequence[Resumed], block: str, ridge: float) -> list[Tensor]:
    """What maps, fitted to all other sequences, say that the block adds: [batch, tokens, width] of each run.

    Copies of a sequence are held out together.
    """
    import torch

    from lamina.maths.affine import held_out

    x, f, owner, spans = [], [], [], []
    for run in runs:
        entering, leaving = run.entering[block], run.leaving[block]
        rows = run.rows_at(block)
        x.append(rows.strip(entering).double())
        f.append(rows.strip(leaving).double() - x[-1])
        owner.append(run.rows.owners[rows.sequence.numpy()])
        spans.append((rows, entering))
    guessed = held_out(torch.cat(x), torch.cat(f), np.concatenate(owner), ridge)
    found = []
    for part, (rows, entering) in zip(guessed.split([len(p) for p in x]), spans, strict=True):
        whole = torch.zeros((*rows.mask.shape, entering.shape[-1]), dtype=torch.float64, device=entering.device)
        whole[rows.mask.to(whole.device)] = part
        found.append(whole.reshape(entering.shape))
    return found


def _ratio(sums: Array, dense: Array) -> tuple[Array, Array]:
    """Σ sums / Σ dense and its standard error over sequences, [1] each."""
    from lamina.maths.sums import Sums

    both = Sums()
    both.add(np.stack([sums, dense], 1))
    top, below = both.total
    return np.array([top / below]), np.array([both.stderr([1 / below, -top / below**2])])


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Array, Array]:
    import torch

    sums, counts = zip(*parts, strict=True)
    return torch.cat(sums).cpu().numpy(), torch.cat(counts).cpu().numpy()


def _prefix(blocks: Sequence[str]) -> str:
    return blocks[0].rpartition("block.")[0]
