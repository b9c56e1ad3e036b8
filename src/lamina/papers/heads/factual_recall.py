"""Key mechanisms of factual recall: what each head and MLP says of the answer itself, straight to the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from lamina.core.errors import UnsupportedError
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.anatomy import Anatomy
    from lamina.core.scores import Array, Grid, Scores
    from lamina.core.sites import Site
    from lamina.lab import Lab
    from lamina.lab.taps import Taps

PAPER = Paper(
    key="lv2024interpreting",
    title="Interpreting Key Mechanisms of Factual Recall in Transformer-Based Language Models",
    authors=(
        "Ang Lv",
        "Yuhan Chen",
        "Kaiyi Zhang",
        "Yulong Wang",
        "Lifeng Liu",
        "Ji-Rong Wen",
        "Jian Xie",
        "Rui Yan",
    ),
    year=2024,
    arxiv="2403.19521",
)

ROWS = 256
"""States that are decoded at once."""
MLPS = (Kind.MLP, Kind.MOE)


@measure(
    "direct-effect",
    PAPER,
    on=(Kind.HEAD, *MLPS),
    needs=Need.ABLATION,
    deviations=(
        "prompts are the beginnings of the text's sequences and answers the tokens that follow; the paper asks for "
        "capitals of nations, and corrupts the nation, where here all tokens of the prompt are put in another order",
        "the receiver is the final residual with all else frozen, MLPs too, so that a patch is worked out and not run",
        "effects are relative to the mean size of the metric; the score is the mean size of an effect, so that heads "
        "that speak for the answer on some prompts and against it on others do not cancel (the paper's map is signed)",
        "of the paper's reading of MLPs the least squares alone, which are inferred; no answers are redirected and "
        "nothing is scaled",
    ),
)
@dataclass(frozen=True, kw_only=True)
class DirectEffect:
    """How far the answer's logit moves when what a head or MLP adds at the end is that of corrupted prompts.

    Δ = change of (answer's logit - mean logit) with the sender's output at the last token replaced by its mean over
    corrupted prompts, and the last norm applied to the patched residual; the score is mean |Δ| / mean |metric| over
    `sequences` prompts of up to `length` tokens. The grids `heads` and `mlps` have the signed effects; `explained` the
    share of each MLP's output that a sum of preceding heads' outputs makes, and `coefficients` the heads' parts in it.
    """

    card: ClassVar[Card]

    sequences: int = 32
    length: int = 128

    def __post_init__(self) -> None:
        if self.sequences < 1:
            raise ValueError(f"sequences must be at least 1, not {self.sequences}")
        if self.length < 2:
            raise ValueError(f"length must be at least 2, not {self.length}")

    def measure(self, lab: Lab) -> Scores:
        """Two forwards over the prompts, and the head on every patched state."""
        import torch

        from lamina.lab.lab import decoder
        from lamina.lab.probes import noise_of
        from lamina.lab.prompts import prompts

        decoder(lab.anatomy)  # raises for a model that predicts no tokens
        _expect_sums(lab.anatomy)
        chosen = [p.cpu() for p in prompts(lab, self.sequences, self.length + 1, shortest=3)]
        answers = torch.stack([p[-1] for p in chosen])
        clean = [p[:-1] for p in chosen]
        noises = [noise_of(p.tolist(), "order", lab.seed) for p in clean]
        corrupted = [p[torch.randperm(len(p), generator=n)] for p, n in zip(clean, noises, strict=True)]
        return self.effects(lab, ends(lab, clean), ends(lab, corrupted), answers)

    def effects(self, lab: Lab, clean: Ends, corrupted: Ends, answers: Tensor) -> Scores:
        """The scores from what was seen at the ends of clean and of corrupted prompts; `answers` [prompts]."""
        from lamina.core.scores import Scores
        from lamina.maths.moments import Mean

        metric = _metric(lab, clean.final, answers)
        values, errors, signed, missing = {}, {}, {}, {}
        senders = [s for s in lab.anatomy.sublayers if s.kind in (Kind.ATTENTION, *MLPS)]
        for done, site in enumerate(senders):
            try:
                name, patched = _patched(lab.anatomy, site, clean, corrupted)
            except UnsupportedError as reason:
                missing[f"{site.id}.{Kind.HEAD.value}" if site.kind is Kind.ATTENTION else site.id] = reason.what
                continue
            moved = _metric(lab, patched.flatten(0, 1), answers.repeat(len(patched)))
            change = (moved.reshape(len(patched), -1) - metric).T  # [prompts, senders]
            mean = Mean()
            mean.add(np.abs(change), np.abs(metric))
            values[name], errors[name] = mean.value, mean.stderr
            signed[name] = change.sum(0) / np.abs(metric).sum()
            lab.progress("direct effects", done + 1, len(senders))
        grids = _maps(lab.anatomy, signed) | _explained(lab.anatomy, clean)
        return Scores(measure=self.card.name, values=values, stderr=errors, grids=grids, missing=missing)


@dataclass(eq=False)
class Ends:
    """What is seen at the last token of every prompt, a row per prompt.

    `final` is the final residual, `added` what each sublayer adds, `inner` what enters the last map of an attention.
    """

    final: Tensor
    added: dict[str, Tensor] = field(default_factory=dict)
    inner: dict[str, Tensor] = field(default_factory=dict)


class _Listener:
    """Fills `Ends`; no tally for others."""

    wants = frozenset({"inner"})

    def __init__(self, last: str) -> None:
        self.last = last
        self.seen: dict[tuple[str, str], list[Tensor]] = {}

    def add(self, site: Site, taps: Taps) -> None:
        """Take in one site on one batch."""
        if site.id == self.last:
            self.seen.setdefault((site.id, "final"), []).append(taps.leaving[taps.last])
        if site.kind in (Kind.ATTENTION, *MLPS):
            self.seen.setdefault((site.id, "added"), []).append(taps.f[taps.last])
        if site.kind is Kind.ATTENTION and taps.inner is not None:
            self.seen.setdefault((site.id, "inner"), []).append(taps.inner[taps.last].float())

    def merge(self, other: _Listener) -> _Listener:
        """Never asked for: it listens to one pass."""
        raise TypeError("it listens to one pass")

    def scores(self) -> Scores:
        """Never asked for: the measure has them."""
        raise TypeError("ask the measure")


def ends(lab: Lab, sequences: Sequence[Tensor]) -> Ends:
    """One forward over some prompts of token ids [tokens]."""
    import torch

    last = lab.anatomy.stacks[0].blocks[-1].site.id
    listener = _Listener(last)
    runs = [torch.stack(list(alike)) for _, alike in groupby(sequences, key=len)]
    bench = lab.on([{"input_ids": part} for run in runs for part in run.split(8)])
    bench.counts = lab.counts
    bench.stream([listener], "prompts", score=False)
    made = Ends(torch.cat(listener.seen.pop((last, "final"))))
    for (site, what), parts in listener.seen.items():
        getattr(made, what)[site] = torch.cat(parts)
    return made


def _expect_sums(anatomy: Anatomy) -> None:
    """Raise UnsupportedError where the final residual is not the sum of what the sublayers add."""
    stack = anatomy.stacks[0]
    odd = next((b for b in stack.blocks if not b.plain), None)
    if odd is not None or not stack.linked or stack.looped:
        what = "its stream is more than a sum of what its sublayers add, so that no effect is direct"
        raise UnsupportedError(what, where=odd.site.id if odd is not None else stack.path)


def _metric(lab: Lab, states: Tensor, answers: Tensor) -> Array:
    """The answer's logit minus the mean logit of each state, float64."""
    found = []
    for start in range(0, len(states), ROWS):
        logits = lab.decode(states[start : start + ROWS])
        own = answers[start : start + ROWS].to(logits.device).unsqueeze(1)
        found.append((logits.gather(1, own).squeeze(1) - logits.mean(-1)).double().cpu().numpy())
    return np.concatenate(found)


def _patched(anatomy: Anatomy, site: Site, clean: Ends, corrupted: Ends) -> tuple[str, Tensor]:
    """The id of the senders' site, and the final residual [senders, prompts, width] with each of them patched."""
    import torch

    if site.kind is not Kind.ATTENTION:
        change = corrupted.added[site.id].mean(0) - clean.added[site.id]
        return site.id, (clean.final + change).unsqueeze(0)
    heads = _heads(anatomy, site, clean)
    with torch.no_grad():
        whole = heads.joins(clean.inner[site.id])
        wrong = float((whole - clean.added[site.id]).norm() / clean.added[site.id].norm().clamp_min(1e-30))
        if wrong > 1e-2:
            raise UnsupportedError("what its heads add can't be told from what enters its last map", where=site.id)
        found = []
        for columns in heads.columns:
            inner = clean.inner[site.id].clone()
            inner[:, columns] = corrupted.inner[site.id][:, columns].mean(0)
            found.append(clean.final + heads.joins(inner) - whole)
    return heads.site.id, torch.stack(found)


class _Heads(NamedTuple):
    """The heads of an attention: their columns of the last map's input, and what the stream gets of such inputs.

    `linear`: nothing but that map and a factor come between, so that heads add up; `weight` [width, features] is both.
    """

    site: Site
    columns: list[list[int]]
    joins: Callable[[Tensor], Tensor]
    weight: Tensor
    linear: bool


def _heads(anatomy: Anatomy, site: Site, clean: Ends) -> _Heads:
    """Raises UnsupportedError where there are none."""
    heads = next(iter(anatomy.units(site, Kind.HEAD)), None)
    if heads is None or site.id not in clean.inner:
        why = anatomy.refused_units(site).get(f"{site.id}.{Kind.HEAD.value}", "its heads were not found")
        raise UnsupportedError(why, where=site.id)
    branch, model = anatomy.branch(site), anatomy.model
    path = anatomy.tail(heads)
    tail, outlet = model.get_submodule(path), f"{anatomy.block(site).path}.{branch.outlet}"
    linear = path == f"{anatomy.block(site).path}.{branch.tail}" and not branch.way
    dtype = next(tail.parameters()).dtype

    def joins(inner: Tensor) -> Tensor:
        made = tail(inner.to(dtype).unsqueeze(0))
        made = made if linear else model.get_submodule(outlet)(made)  # a norm behind it
        return made[0].float() * branch.scale

    weight = anatomy.weight(next(s for s in anatomy.linears(site) if s.path == path)).detach().float() * branch.scale
    return _Heads(heads, [list(c) for c in anatomy.columns(heads)], joins, weight, linear)


def _maps(anatomy: Anatomy, signed: dict[str, Array]) -> dict[str, Grid]:
    """Signed effects: of heads [attentions, heads], NaN where there are fewer, and of MLPs [MLPs, 1]."""
    from lamina.core.scores import Grid

    found = {}
    for name, is_head in (("heads", True), ("mlps", False)):
        rows = {s: v for s, v in signed.items() if (anatomy.site(s).kind is Kind.HEAD) is is_head}
        width = max((len(v) for v in rows.values()), default=0)
        table = np.full((len(rows), width), np.nan)
        for row, values in zip(table, rows.values(), strict=True):
            row[: len(values)] = values
        columns = tuple(map(str, range(width))) if is_head else ("effect",)
        found |= {name: Grid(values=table, rows=tuple(rows), columns=columns)} if rows else {}
    return found


def _explained(anatomy: Anatomy, clean: Ends) -> dict[str, Grid]:
    """Least squares over all prompts and channels of each MLP's output by the outputs of the heads before it."""
    import torch

    from lamina.core.scores import Grid

    outputs: list[Tensor] = []
    names: list[str] = []
    table: dict[str, tuple[float, Array]] = {}
    for block in anatomy.stacks[0].blocks:
        start, joined = len(outputs), list[int]()
        for branch in block.branches:
            site, known = branch.site, max([start, *(joined[i] for i in branch.reads)])
            if site.kind in MLPS and known:
                table[site.id] = _fit(torch.stack(outputs[:known]), clean.added[site.id])
            for name, output in _outputs(anatomy, site, clean) if site.kind is Kind.ATTENTION else ():
                names.append(name)
                outputs.append(output)
            joined.append(len(outputs))
    if not table:
        return {}
    shares = np.array([[share] for share, _ in table.values()])
    parts = np.full((len(table), len(names)), np.nan)
    for row, (_, found) in zip(parts, table.values(), strict=True):
        row[: len(found)] = found
    return {
        "explained": Grid(values=shares, rows=tuple(table), columns=("share",)),
        "coefficients": Grid(values=parts, rows=tuple(table), columns=tuple(names)),
    }


def _outputs(anatomy: Anatomy, site: Site, clean: Ends) -> list[tuple[str, Tensor]]:
    """What each head of an attention adds, [prompts, width]; nothing where they do not add up."""
    try:
        heads = _heads(anatomy, site, clean)
    except UnsupportedError:
        return []
    inner = clean.inner[site.id]
    made = [inner[:, c] @ heads.weight[:, c].T for c in heads.columns] if heads.linear else []
    return [(f"{heads.site.id}.{i}", output) for i, output in enumerate(made)]


def _fit(heads: Tensor, out: Tensor) -> tuple[float, Array]:
    """The share of ‖out‖² that Σ αₕ headₕ makes at best, and α [heads]; `heads` [heads, prompts, width]."""
    flat, goal = heads.flatten(1).double(), out.flatten().double()
    gram, right = (flat @ flat.T).cpu().numpy(), (flat @ goal).cpu().numpy()
    alpha = np.linalg.lstsq(gram, right, rcond=1e-10)[0]
    whole = float(goal @ goal)
    share = float(2 * alpha @ right - alpha @ gram @ alpha) / whole if whole > 0 else 0.0
    return share, alpha
