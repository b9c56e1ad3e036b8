"""What sublayers take in seconds, dense and changed, measured on this machine in the model itself."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from lamina.core.documents import Step
from lamina.core.errors import InputError
from lamina.core.menu import Times
from lamina.core.registry import rewrite_of
from lamina.planners._trials import kept_shapes

if TYPE_CHECKING:
    from torch import nn

    from lamina.anatomy import Anatomy
    from lamina.core.menu import Option
    from lamina.lab import Lab

ROUNDS, STEPS = 5, 8


def saved(times: Times, option: Option, anatomy: Anatomy) -> float:
    """Seconds that an option frees, as measured where the same was done to a sublayer of the same shape."""
    freed = 0.0
    for site in option.groups:
        key = change(option.steps, anatomy, site)
        if option.kinds == ("drop",):
            freed += times.sites.get(site, 0.0)
        elif key in times.left:
            freed += times.sites.get(site, 0.0) * (1 - times.left[key])
    return freed


def change(steps: Sequence[Step], anatomy: Anatomy, site: str) -> str:
    """A name for what steps do to a sublayer's shapes; the same for all sublayers where it takes as long. "" where
    shapes stay.
    """
    said = [_told(s, anatomy) for s in steps if not kept_shapes(s)]
    shapes = [tuple(anatomy.weight(x).shape) for x in anatomy.linears(anatomy.site(site))]
    return f"{anatomy.site(site).kind.value} {shapes}: {'; '.join(said)}" if said else ""


def _told(step: Step, anatomy: Anatomy) -> str:
    if step.rewrite == "narrow":
        gone = step.options["gone"]
        return ", ".join(f"{anatomy.site(s).kind.value} {anatomy.site(s).width - len(gone[s])}" for s in step.sites)
    ranks = step.options.get("rank")
    if isinstance(ranks, Mapping):
        return f"ranks {[ranks[s] for s in step.sites]}"  # whatever method finds them
    return f"{step.rewrite} {dict(step.options)}"


def measured(lab: Lab, options: Iterable[Option], work: str) -> Times:
    """The table of one work for all that `options` do, measured on the lab's model; nothing is changed.

    Dense model and changed copies run in turn, so that drift falls on both alike. A copy shares all weights that it
    doesn't change. Raises InputError for a model without a cache where decoding is asked for.
    """
    kind, _, shape = work.partition(":")
    batch, tokens = (int(n) for n in shape.split("x"))
    clockwork = _Clockwork(lab, kind, batch, tokens)
    anatomy = lab.anatomy
    changes: dict[str, tuple[str, tuple[Step, ...]]] = {}
    waiting: dict[str, dict[str, tuple[Step, ...]]] = {}
    for option in options:
        site = option.groups[0]
        key = change(option.steps, anatomy, site)
        if option.kinds != ("drop",) and len(option.groups) == 1 and key and key not in changes:
            changes[key] = (site, option.steps)
    for key, (site, steps) in changes.items():
        place = _room(anatomy, site, waiting)
        waiting.setdefault(place, {})[key] = tuple(_moved(s, anatomy, site, place) for s in steps if not kept_shapes(s))
    shares: dict[str, float] = {}
    dense: list[Mapping[str, float]] = []
    totals: list[float] = []
    copies = _copies(waiting) or [{}]
    for number, chosen in enumerate(copies):
        variant = _changed(lab, chosen)
        rows = {place: list[float]() for place in chosen}
        for turn in range(-1, ROUNDS):
            first = clockwork.sites(lab.model, anatomy)
            others = [clockwork.sites(variant, anatomy) for _ in (1, 2) if chosen]
            second = clockwork.sites(lab.model, anatomy)
            if turn < 0:
                continue
            dense += [first, second]
            totals.append(clockwork.seconds(lab.model))
            for place, row in rows.items():
                row.append(sum(o[place] for o in others) / (first[place] + second[place]))
            lab.progress("latency", number * ROUNDS + turn + 1, len(copies) * ROUNDS)
        shares |= {chosen[place][0]: statistics.median(row) for place, row in rows.items()}
    sites = {s: statistics.median(d[s] for d in dense) for s in dense[0]}
    return Times(work=work, total=statistics.median(totals), sites=sites, left=shares)


def _room(anatomy: Anatomy, site: str, waiting: Mapping[str, Mapping[str, Any]]) -> str:
    """The sublayer of the site's shape at which the fewest changes wait."""
    shapes = _shapes(anatomy, site)
    alike = [s.id for s in anatomy.sublayers if _shapes(anatomy, s.id) == shapes]
    return min(alike, key=lambda s: len(waiting.get(s, {})))


def _shapes(anatomy: Anatomy, site: str) -> Any:
    found = anatomy.site(site)
    units = [(s.kind, s.width) for s in anatomy.units(found)]
    return found.kind, units, [tuple(anatomy.weight(x).shape) for x in anatomy.linears(found)]


def _moved(step: Step, anatomy: Anatomy, site: str, place: str) -> Step:
    """The step at another sublayer of the same shape, without what only numbers hang on."""
    names = {s: place + s.removeprefix(site) for s in step.sites}
    options = {
        k: {names[s]: v for s, v in value.items()} if isinstance(value, Mapping) else value
        for k, value in step.options.items()
        if k != "refit"
    }
    ranked = isinstance(options.get("rank"), Mapping)
    return Step(rewrite="svd" if ranked else step.rewrite, sites=tuple(names.values()), options=options)


Chosen = Mapping[str, tuple[str, tuple[Step, ...]]]


def _copies(waiting: Mapping[str, Mapping[str, tuple[Step, ...]]]) -> list[Chosen]:
    """As few copies as can be: place → (name, steps) of what each has changed, at most one change of a sublayer."""
    depth = max((len(w) for w in waiting.values()), default=0)
    return [{place: list(w.items())[n] for place, w in waiting.items() if n < len(w)} for n in range(depth)]


def _changed(lab: Lab, chosen: Chosen) -> nn.Module:
    """A copy of the model with the steps done; weights of untouched sublayers are the model's own."""
    from lamina.lab import Lab as Other

    touched = set[int]()
    for place in chosen:
        block = lab.model.get_submodule(lab.anatomy.block(place).path)
        touched |= {id(p) for _, p in lab.anatomy.branch(place).owned(block)}
    kept = {id(p): p for p in lab.model.parameters() if id(p) not in touched}
    model = copy.deepcopy(lab.model, kept)
    bench = Other(model, lab.batches[0]["input_ids"][:1, :8])
    for step in (s for _, steps in chosen.values() for s in steps):
        rewrite_of(step).apply(step, bench)
    return model


class _Clockwork:
    """Runs one work of a model and tells what each sublayer of it takes."""

    def __init__(self, lab: Lab, kind: str, batch: int, tokens: int) -> None:
        from lamina.lab.workloads import Workloads

        self.kind, self.runs = kind, Workloads(lab, batch)
        self.ids = self.runs.ids(tokens)
        self.calls = STEPS if kind == "decode" else 1

    def seconds(self, model: nn.Module) -> float:
        """Of one pass, or of one token."""
        from lamina.lab.workloads import clock

        if self.kind == "decode":
            spent = self.runs.decode(model, self.ids, STEPS)
            if spent is None:
                raise InputError("the model keeps no cache: it does not decode", where="--latency", hint="@prefill")
            return spent / STEPS
        start = clock(self.runs.device)
        self.runs.prefill(model, self.ids)
        return clock(self.runs.device) - start

    def sites(self, model: nn.Module, anatomy: Anatomy) -> dict[str, float]:
        """Seconds of every sublayer, of one pass or of one token (prompt left out)."""
        from lamina.lab.workloads import modules_of, timed

        paths = {s.id: modules_of(anatomy, [s.id]) for s in anatomy.sublayers}
        with ExitStack() as held:
            spans = {
                s: [held.enter_context(timed(model, [p], self.runs.device)) for p in at] for s, at in paths.items()
            }
            self.seconds(model)
        return {s: sum(sum(calls[-self.calls :]) for calls in rows) / self.calls for s, rows in spans.items()}
