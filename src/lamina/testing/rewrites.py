"""Checks for rewrites: the forecast is the fact, the trial is the result, and a receipt rebuilds the structure.

A rewrite is tried on dropped-in places (`PLACES`) of every tiny model. One that needs options, or takes other sites,
offers `examples(anatomy) -> Sequence[Step]` as a static method, and is tried on these.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from lamina.anatomy import Anatomy
from lamina.core.documents import ModelRef, Receipt, Receipts, Step
from lamina.core.errors import LaminaError
from lamina.core.sites import Cost, Kind
from lamina.lab import Lab
from lamina.testing.bench import fresh, lab, rows, text
from lamina.testing.measures import refuses_unknown_option
from lamina.testing.models import BUILDERS, CONFIGS, NAMES, padded
from lamina.testing.suite import card_of, check, class_of, expect, made, run_checks

EXACT = 2e-5
"""What float32 logits (of size one to ten) may differ by, when the same sums are taken in another way."""
Places = tuple[tuple[int, int | None], ...]
PLACES: tuple[Places, ...] = (
    ((0, 0), (1, 1), (3, None)),
    ((1, 0), (3, 0), (2, None)),
    ((1, None),),
    ((0, 0),),
    ((3, 1),),
    ((0, None), (1, 0), (1, 1)),
)
"""Sets of (block, branch; None: the whole block): several with layer 0's attention; all but one attention; one block;
layer 0's attention; one MLP; two blocks, one of them by its parts."""
ALL_PLACES = ("llama", "gemma2", "gpt_neox", "falcon", "mixtral")
"""Pre-norm, sandwich norm with two layer types, parallel, parallel with shared norms and in-place sums, experts."""


def steps_for(method: Any, name: str) -> list[Step]:
    """The steps that a rewrite is tried on, on one tiny model."""
    anatomy = fresh(name)[1]
    if hasattr(class_of(method), "examples"):
        return list(class_of(method).examples(anatomy))
    return [step_at(method, anatomy, places) for places in (PLACES if name in ALL_PLACES else PLACES[:2])]


def step_at(method: Any, anatomy: Anatomy, places: Places) -> Step:
    """The step that rewrites the sites at these places."""
    blocks = anatomy.stacks[0].blocks
    sites = (blocks[n].site if i is None else blocks[n].branches[i].site for n, i in places)
    return Step(rewrite=card_of(method).name, sites=tuple(s.id for s in sites))


def _drops(cls: type) -> bool:
    return card_of(cls).name == "drop"


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, **inputs: Any) -> Tensor:
    """Logits of one forward without a cache."""
    extra = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    out = model(ids, **inputs, **extra)
    return out if isinstance(out, Tensor) else out.logits


def _off(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max())


@dataclass(frozen=True, eq=False)
class Trial:
    """One step on one tiny model: what was forecast and tried before, and what came of it."""

    name: str
    step: Step
    bench: Lab
    receipt: Receipt
    before: Cost
    forecast: Cost
    ablated: Tensor

    @property
    def at(self) -> str:
        """For messages."""
        return f"on {self.name}, {self.step.sites}"


@cache
def _tried(method: Any, name: str, place: int) -> Trial:
    """Apply a step to a fresh tiny model, once per process: what reads the result shares it and leaves it alone."""
    bench, step = lab(name), steps_for(method, name)[place]
    before, forecast = bench.anatomy.total(), made(method).forecast(step, bench.anatomy)
    with bench.ablate(step.sites):
        ablated = logits(bench.model, text())
    receipt = made(method).apply(step, bench)
    return Trial(name, step, bench, receipt, before, forecast, ablated)


def trials(method: Any, names: Sequence[str] = NAMES) -> Iterator[Trial]:
    """All steps on these models."""
    for name in names:
        for place in range(len(steps_for(method, name))):
            yield _tried(method, name, place)


@check("rewrite")
def check_forecast_is_the_fact(method: Any) -> None:
    """Forecast, receipt and the changed model's own costs are one and the same, to the last parameter and product."""
    for t in trials(method):
        real = t.bench.anatomy.total()
        held = sum(p.numel() for p in {id(p): p for p in t.bench.model.parameters()}.values())
        expect(t.receipt.before == t.before, f"{t.at}: before is {t.receipt.before}, the model took {t.before}")
        expect(t.forecast == t.receipt.after, f"{t.at}: forecast {t.forecast}, receipt {t.receipt.after}")
        expect(real == t.receipt.after, f"{t.at}: the model takes {real}, the receipt says {t.receipt.after}")
        expect(real.parameters == held, f"{t.at}: {held} parameters are in memory, {real.parameters} in the costs")
        expect(t.bench.anatomy.model is t.bench.model, f"{t.at}: the lab's anatomy is not the changed model's")


@check("rewrite")
def check_costs_do_not_grow(method: Any) -> None:
    """What is rewritten costs no more than before; what is dropped costs less."""
    for t in trials(method, ("llama",)):
        fields = ("parameters", "bytes", "macs", "kv_bytes")
        grown = [f for f in fields if getattr(t.receipt.after, f) > getattr(t.receipt.before, f)]
        expect(not grown, f"{t.at}: more {grown} than before")
        less = t.receipt.after.bytes < t.receipt.before.bytes
        expect(less or not _drops(class_of(method)), f"{t.at}: dropping frees no bytes")


@check("rewrite")
def check_needs_no_weights_to_check_and_forecast(method: Any) -> None:
    """`check` and `forecast` work on a model whose weights are on the meta device."""
    for step in steps_for(method, "llama"):
        anatomy = fresh("llama")[1]
        there = made(method).forecast(step, anatomy)
        anatomy.model.to("meta")
        expect(made(method).check(step, anatomy) == [], f"{step.sites}: a problem once the weights are gone")
        expect(
            made(method).forecast(step, anatomy) == there, f"{step.sites}: another forecast once the weights are gone"
        )


@check("rewrite", _drops)
def check_result_is_the_trial(method: Any) -> None:
    """The rewritten model computes what trial ablation computed."""
    for t in trials(method):
        off = _off(logits(t.bench.model, text()), t.ablated)
        expect(off <= EXACT, f"{t.at}: the result is {off:.1e} off the trial")


@check("rewrite")
@torch.no_grad()
def check_cached_decoding_is_the_full_forward(method: Any) -> None:
    """Token by token with a cache gives the logits of one forward, beyond windows and without layer 0's attention."""
    ids = text(2, 14)
    for t in trials(method, tuple(CONFIGS)):
        model: Any = t.bench.model
        out = model(ids[:, :5], use_cache=True)
        parts = [out.logits]
        for at in range(5, ids.shape[1]):
            out = model(ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
        off = _off(torch.cat(parts, 1), logits(model, ids))
        expect(off <= EXACT, f"{t.at}: cached decoding is {off:.1e} off the full forward")
        held = sum(getattr(layer, "keys", None) is not None for layer in out.past_key_values.layers)
        caching = [s.id for s in t.bench.anatomy.sublayers if t.bench.anatomy.branch(s).cached]
        expect(held == len(caching), f"{t.at}: {held} cache entries are in use for {caching}")
        expect(held == len(out.past_key_values.layers), f"{t.at}: the cache has entries that nothing fills")


@check("rewrite")
@torch.no_grad()
def check_left_padded_batch_is_its_rows(method: Any) -> None:
    """Each row of a left-padded batch gets the logits that it gets alone."""
    (batch,) = padded(rows(), len(rows()), side="left")
    inputs = {k: v for k, v in batch.items() if k != "input_ids"}
    for t in trials(method, tuple(CONFIGS)):
        together = logits(t.bench.model, batch["input_ids"], **inputs)
        for i, row in enumerate(rows()):
            off = _off(together[i, -len(row) :], logits(t.bench.model, row.unsqueeze(0))[0])
            expect(off <= EXACT, f"{t.at}: row {i} is {off:.1e} off when padded on the left")


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}


@check("rewrite")
def check_replay_rebuilds_the_structure(method: Any) -> None:
    """On an empty skeleton, a receipt read back from JSON gives the same keys, shapes and config."""
    for t in trials(method):
        with torch.device("meta"):
            skeleton = BUILDERS[t.name]()
        made(method).replay(_written(t.receipt).receipts[0], skeleton)
        expect(list(_shapes(skeleton)) == list(_shapes(t.bench.model)), f"{t.at}: replay gives other keys")
        expect(_shapes(skeleton) == _shapes(t.bench.model), f"{t.at}: replay gives other shapes")
        mine, yours = (getattr(m, "config", None) for m in (skeleton, t.bench.model))
        same = mine is None or yours is None or mine.to_dict() == yours.to_dict()
        expect(same, f"{t.at}: replay gives another config")


def _written(*receipts: Receipt) -> Receipts:
    """The receipts, written to a file and read back."""
    document = Receipts(model=ModelRef(name="tiny", fingerprint="sha256:0"), plan="sha256:0", receipts=receipts)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "receipts.json"
        document.save(path)
        first = path.read_bytes()
        read = Receipts.load(path)
        read.save(path)
        expect(read.to_data() == document.to_data(), f"receipts change when written and read: {document} became {read}")
        expect(path.read_bytes() == first, "receipts change their bytes when read and written again")
    return read


@check("rewrite", _drops)
@torch.no_grad()
def check_twice_applied(method: Any) -> None:
    """A second step on the result is the trial of both on the dense model; both receipts replay in turn."""
    for name in NAMES:
        bench = lab(name)
        dense = copy.deepcopy(bench.model)
        ids, both = text(), step_at(method, bench.anatomy, ((0, 0), (1, 1), (2, 1), (3, None)))
        with bench.ablate(both.sites):
            trial = logits(bench.model, ids)
        first = made(method).apply(step_at(method, bench.anatomy, ((0, 0), (2, 1))), bench)
        left = [p.id for b in bench.anatomy.of_kind(Kind.BLOCK) for p in bench.anatomy.parts(b)]
        gone = [s for s in left if s in both.sites[:3:2]]
        expect(not gone and len(left) == 6, f"on {name}: dropped sites are still listed, or kept ones renamed: {left}")
        second = made(method).apply(step_at(method, bench.anatomy, ((1, 1), (3, None))), bench)
        off = _off(logits(bench.model, ids), trial)
        expect(off <= EXACT, f"on {name}: two steps are {off:.1e} off the trial of both")
        for receipt in _written(first, second).receipts:
            made(method).replay(receipt, dense)
        off = _off(logits(dense, ids), trial)
        expect(off <= EXACT, f"on {name}: replaying two receipts with weights is {off:.1e} off")
        expect(second.before == first.after, f"on {name}: {first.after}, then before the next step {second.before}")


@check("rewrite")
def check_refuses_unknown_sites(method: Any) -> None:
    """A step that names no site of the model, or none at all, is a problem before anything is changed."""
    options = steps_for(method, "llama")[0].options
    _refuses(method, [("block.9",), ("block.0.attentoin",), ()], options)


@check("rewrite", _drops)
def check_refuses_to_leave_nothing(method: Any) -> None:
    """A step that leaves no block, or no attention, is a problem; also when little was left before."""
    anatomy = fresh("llama")[1]
    blocks, attentions = (tuple(s.id for s in anatomy.of_kind(k)) for k in (Kind.BLOCK, Kind.ATTENTION))
    _refuses(method, [blocks, attentions], {})
    bench = lab()
    made(method).apply(Step(rewrite="drop", sites=attentions[1:]), bench)
    problems = made(method).check(Step(rewrite="drop", sites=attentions[:1]), bench.anatomy)
    expect(bool(problems), "the last attention of a thinned model may go")


def _refuses(method: Any, refused: list[tuple[str, ...]], options: Any) -> None:
    bench = lab()
    before = _shapes(bench.model)
    for sites in refused:
        step = Step(rewrite=card_of(method).name, sites=sites, options=options)
        expect(bool(made(method).check(step, bench.anatomy)), f"{sites} can't be done, and check says nothing")
        try:
            made(method).apply(step, bench)
        except LaminaError as error:
            expect("\n" not in str(error), f"{sites}: the error is not one line: {error}")
        else:
            raise AssertionError(f"{sites} can't be done, and apply did something")
        expect(_shapes(bench.model) == before, f"{sites}: a refused step changed the model")


@check("rewrite")
def check_unknown_rewrite_option_is_refused(method: Any) -> None:
    """The registry refuses an option that the rewrite does not have, with a hint."""
    refuses_unknown_option(method)


def check_rewrite(method: Any) -> None:
    """Run every check that applies to a rewrite (its class, or an instance)."""
    run_checks("rewrite", method)
