"""Layer Sustainability Analysis: how far each layer's states move when the input is perturbed."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.scores import Array, Grid, Scores
from lamina.core.sites import Kind
from lamina.maths.moments import Mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from lamina.anatomy.parts import Block
    from lamina.lab import Lab
    from lamina.lab.rows import Rows

PAPER = Paper(
    key="khalooei2022lsa",
    title="Layer-wise Regularized Adversarial Training using Layers Sustainability Analysis (LSA) framework",
    authors=("Mohammad Khalooei", "Mohammad Mehdi Homayounpour", "Maryam Amirmazlaghani"),
    year=2022,
    arxiv="2202.02626",
)
ATTACKS = ("noise", "fgsm")


@measure(
    "sustainability",
    PAPER,
    on=Kind.BLOCK,
    needs=Need.GRADIENT,
    status="stable",
    deviations=(
        "layers are blocks, and what is perturbed is the stream before the first: tokens can't be moved a little",
        "epsilon is relative to each token's own size",
        "the rule for the most vulnerable layers, mean + alpha · deviation, is inferred",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Sustainability:
    """The relative error behind a block when the first stream is perturbed: ‖φ(x) - φ(x')‖ / ‖φ(x)‖ over all tokens.

    High is vulnerable: what the paper would protect in training, and no sign of what could go. It is that of all blocks
    so far, and an identity block has its predecessor's; what a block itself does to the error is in grid
    `sustainability`: error, error over that before the block, and whether it is among the most vulnerable, above mean +
    `alpha` standard deviations. `attack`: "noise", normal, or "fgsm", the sign of the loss's gradient; both `epsilon`
    times the root mean square of a token's features. The first `length` tokens of `sequences` sequences (None: all);
    `first`: each one's first token counts, as in the paper, though its norm is most of the stream in many models.
    """

    card: ClassVar[Card]

    attack: str = "noise"
    epsilon: float = 0.01
    alpha: float = 1.0
    first: bool = True
    sequences: int | None = 32
    length: int | None = 64
    seed: int | None = None

    known_failures: ClassVar[Mapping[str, str]] = {
        "check_identity_block_is_lowest": "behind an identity block the error is what it was before it"
    }

    def __post_init__(self) -> None:
        if self.attack not in ATTACKS:
            raise ValueError(f"attack is one of {', '.join(ATTACKS)}, not {self.attack!r}")
        if self.epsilon <= 0:
            raise ValueError(f"epsilon is above 0, not {self.epsilon:g}")
        for name in ("sequences", "length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is at least 1, not {value}")

    def measure(self, lab: Lab) -> Scores:
        """Two forwards; for "fgsm" one backward too."""
        from lamina.lab.resume import few

        part = few(lab, self.sequences, self.length)
        means: dict[str, Mean] = {}
        for number, rows in enumerate(part.rows()):
            clean = _streams(part, rows, {})
            moved = self._moved(part, rows, clean)
            for place, (moved_by, size) in self._errors(part, rows, clean, _streams(part, rows, moved)).items():
                means.setdefault(place, Mean()).add(moved_by, size)
            part.progress("perturbed", number + 1, len(part.batches))
        blocks = [b.site.id for k in lab.anatomy.stacks for b in k.blocks]
        values = {b: np.sqrt(np.atleast_1d(means[b].value)) for b in blocks}
        errors = {b: np.atleast_1d(means[b].stderr) / (2 * np.maximum(values[b], 1e-300)) for b in blocks}
        return Scores(measure=self.card.name, values=values, stderr=errors, grids=self._grids(lab, values, means))

    def _moved(self, lab: Lab, rows: Rows, clean: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The perturbed stream before each stack's first block, by that block's id."""
        ways = _signs(lab, rows) if self.attack == "fgsm" else {}
        found = {}
        for stack in lab.anatomy.stacks:
            first = stack.blocks[0].site.id
            x = clean[f"before {first}"].float()
            own = _rows_at(lab, rows, stack.blocks[0], x)
            way = ways[first] if ways else self._noise(lab, own, x)
            size = x.square().mean(-1, keepdim=True).sqrt() * self.epsilon
            found[first] = (x + size * way).to(clean[f"before {first}"].dtype)
        return found

    def _noise(self, lab: Lab, rows: Rows, like: Tensor) -> Tensor:
        """Normal numbers that depend on the seed and what a sequence holds alone, whatever its batch."""
        import torch

        from lamina.lab.probes import noise_of

        seed = lab.seed if self.seed is None else self.seed
        flat = torch.zeros(*rows.mask.shape, like.shape[-1])
        for row, owner in enumerate(rows.owners):
            kept = rows.mask[row]
            noise = noise_of(int(owner), "perturbed", seed)
            flat[row, kept] = torch.randn(int(kept.sum()), like.shape[-1], generator=noise)
        return flat.reshape(like.shape).to(like.device)

    def _errors(
        self, lab: Lab, rows: Rows, clean: Mapping[str, Tensor], moved: Mapping[str, Tensor]
    ) -> dict[str, tuple[Array, Array]]:
        """Σ ‖φ(x) - φ(x')‖² and Σ ‖φ(x)‖² of each sequence, float64 [sequences]: their ratio is the squared error."""
        import torch

        from lamina.lab.per_trial import per_sequence
        from lamina.lab.sampled import behind

        found = {}
        for place, states in clean.items():
            own = _rows_at(lab, rows, lab.anatomy.block(place.removeprefix("before ")), states)
            here, there = own.strip(states).double(), own.strip(moved[place]).double()
            kept = behind(own, 0 if self.first else 1).to(here.device)
            squares = (torch.where(kept, s.square().sum(-1), 0.0) for s in (here - there, here))
            found[place] = tuple(per_sequence(s, own).cpu().numpy() for s in squares)
        return found

    def _grids(self, lab: Lab, values: Mapping[str, Array], means: Mapping[str, Mean]) -> dict[str, Grid]:
        grids = {}
        for stack in lab.anatomy.stacks:
            blocks = tuple(b.site.id for b in stack.blocks)
            errors = np.array([float(np.sqrt(means[f"before {blocks[0]}"].value)), *(values[b][0] for b in blocks)])
            own = errors[1:] / np.maximum(errors[:-1], 1e-300)
            worst = errors[1:] > errors[1:].mean() + self.alpha * errors[1:].std()
            table = np.stack([errors[1:], own, worst], 1).astype(np.float64)
            columns = ("error", "error over that before", "most vulnerable")
            prefix = blocks[0].rpartition("block.")[0]
            grids[f"{prefix}sustainability"] = Grid(values=table, rows=blocks, columns=columns)
        return grids


def _rows_at(lab: Lab, rows: Rows, block: Block, stream: Tensor) -> Rows:
    from lamina.lab.feed import side_of

    return rows.of(side_of(lab.anatomy, block)).on(stream)


def _streams(lab: Lab, rows: Rows, moved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stream behind each block, and before each stack's first ("before …"), in a forward from `moved` streams."""
    import torch

    from lamina.anatomy.watch import watch_blocks

    found: dict[str, Tensor] = {}
    firsts = {k.blocks[0].site.id for k in lab.anatomy.stacks}

    def note(block: Block, entering: Tensor, _: Mapping[str, Tensor], leaving: Tensor) -> None:
        found[block.site.id] = leaving
        if block.site.id in firsts:
            found[f"before {block.site.id}"] = entering

    with torch.no_grad(), _replaced(lab, moved), watch_blocks(lab.model, lab.anatomy, note):
        lab.forward(rows.batch, head=False)
    return found


@contextmanager
def _replaced(lab: Lab, moved: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, these blocks get other streams on their first call."""
    handles = []
    for name, stream in moved.items():
        block, calls = lab.anatomy.block(name), []

        def opens(
            _: Any, args: Any, kwargs: Any, place: Any = block.stream, new: Tensor = stream, calls: list[int] = calls
        ) -> Any:
            calls.append(1)
            if len(calls) > 1:
                return None
            if isinstance(place, int):
                return (*args[:place], new, *args[place + 1 :]), kwargs
            return args, {**kwargs, place: new}

        handles.append(lab.model.get_submodule(block.path).register_forward_pre_hook(opens, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _signs(lab: Lab, rows: Rows) -> dict[str, Tensor]:
    """The signs of the summed loss's gradient with respect to the stream before each stack's first block."""
    import torch

    from lamina.core.errors import UnsupportedError
    from lamina.lab.gradients import frozen, graph_recorded
    from lamina.lab.objective import objective_of, output_of, token_losses

    with frozen(lab.model), torch.enable_grad():
        with graph_recorded(lab.model, lab.anatomy) as passed:
            result = lab.result(rows.batch)
        if objective_of(lab.model, result).name != "next-token":
            raise UnsupportedError("the model predicts no next tokens, so there is no loss", where="attack fgsm")
        firsts = {k.blocks[0].site.id for k in lab.anatomy.stacks}
        entering = {p.block.site.id: p.entering for p in passed if p.block.site.id in firsts}
        loss = token_losses(output_of(result), rows.batch)[0].sum()
        made = torch.autograd.grad(loss, list(entering.values()))
    lab.counts.backwards += int(rows.mask.sum()) * lab.depth
    return {block: g.float().sign() for block, g in zip(entering, made, strict=True)}
