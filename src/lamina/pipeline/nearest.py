"""The nearest plan that a target loads: the smallest change of this one, priced in the parameters that it keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lamina.core.documents import Plan, Receipt, Step
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy

SHOWN = 3
"""Changes that are told in one line before the rest is counted."""


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """A changed plan, what was changed in words, and the parameters that it keeps beyond the plan's (or below 0)."""

    plan: Plan
    changes: tuple[str, ...]
    parameters: int

    @property
    def line(self) -> str:
        """The changes and their price."""
        more = f" and {len(self.changes) - SHOWN} more changes" if len(self.changes) > SHOWN else ""
        return f"{', '.join(self.changes[:SHOWN])}{more} ({self.parameters:+,} parameters)"


def nearest(plan: Plan, targets: Sequence[str], anatomy: Anatomy, receipts: Sequence[Receipt]) -> Nearest | None:
    """The plan changed until all these targets load what it makes; None where it holds nothing that stands in the way.

    Steps of a rewrite that a target can't hold are left out; narrowings are shortened to the nearest width that can be
    said; of a block that has lost a part, either the part stays or the rest goes too, whichever is less.
    """
    draft = _Draft(anatomy, list(plan.steps), receipts)
    for target in targets:
        FIXES[target](draft)
    if not draft.changes:
        return None
    steps = tuple(draft.finished())
    changed = dataclasses.replace(plan, steps=steps, expects={})
    return Nearest(plan=changed, changes=tuple(draft.changes), parameters=draft.parameters)


@dataclass
class _Draft:
    """A plan that is being changed."""

    anatomy: Anatomy
    steps: list[Step]
    receipts: Sequence[Receipt]
    changes: list[str] = dataclasses.field(default_factory=list[str])
    parameters: int = 0

    @property
    def gone(self) -> list[str]:
        """The sites that are dropped."""
        return [site for step in self.steps if step.rewrite == "drop" for site in step.sites]

    def leave_out(self, rewrite: str) -> None:
        """Without the steps of one rewrite."""
        sites = [s for step in self.steps if step.rewrite == rewrite for s in step.sites]
        self.steps = [s for s in self.steps if s.rewrite != rewrite]
        self.changes.append(f"leave out {rewrite} of {_few(sites)}")
        mine = [r for r in self.receipts if r.rewrite == rewrite]
        self.parameters += sum(r.before.parameters - r.after.parameters for r in mine)

    def keep_or_drop(self, block: str, *, first: bool = False) -> None:
        """Put back what the block has lost (`first`: its attention alone), or drop what is left of it."""
        out = self.anatomy.expand(self.gone)
        parts = self.anatomy.parts(block)
        back = [p.id for p in parts if p.id in out and (not first or p.kind is Kind.ATTENTION)]
        less = self._freed(out) - self._freed(out - set(back))
        more = self._freed(out | {p.id for p in parts}) - self._freed(out)
        if less <= more or len(self._kept(out | {p.id for p in parts})) == 0:
            self._set(out - set(back), less)
            self.changes.append(f"keep {_few(back)}")
        else:
            self._set(out | {p.id for p in parts}, -more)
            self.changes.append(f"drop {block} whole")

    def _kept(self, out: frozenset[str] | set[str]) -> list[str]:
        return [s.id for s in self.anatomy.sublayers if s.id not in out]

    def _freed(self, out: frozenset[str] | set[str]) -> int:
        return self.anatomy.freed(sorted(out)).parameters

    def _set(self, out: frozenset[str] | set[str], parameters: int) -> None:
        """Drop these sublayers and no others; each by the first step that drops a part of its block, if any does."""
        self.parameters += parameters
        rest, steps = list(self.anatomy.collapse(out)), []
        for step in self.steps:
            if step.rewrite != "drop":
                steps.append(step)
                continue
            mine = [s for s in rest if self.anatomy.expand([s]) & self.anatomy.expand(step.sites)]
            rest = [s for s in rest if s not in mine]
            if mine:
                steps.append(dataclasses.replace(step, sites=tuple(mine)))
        self.steps = steps + [Step(rewrite="drop", sites=(s,)) for s in rest]

    def finished(self) -> list[Step]:
        """The steps, with refits around what is dropped after all, and without sites that have gone."""
        from lamina.rewrites.refit import refit_sites

        out, steps = self.anatomy.expand(self.gone), []
        for step in self.steps:
            if step.rewrite == "refit":
                around = list(self.anatomy.collapse(out))
                sites = refit_sites(self.anatomy, around)
                step = dataclasses.replace(step, sites=sites, options={**step.options, "around": around})  # noqa: PLW2901
            elif step.rewrite != "drop":
                sites = tuple(s for s in step.sites if not any(s == g or s.startswith(f"{g}.") for g in out))
                step = _on(step, sites)  # noqa: PLW2901
            if step.sites:
                steps.append(step)
        return steps


def _on(step: Step, sites: tuple[str, ...]) -> Step:
    """The step on some of its sites; options that are told site by site lose the others."""
    told: dict[str, Any] = {
        k: {s: v for s, v in value.items() if s in sites} if isinstance(value, Mapping) else value
        for k, value in step.options.items()
    }
    return dataclasses.replace(step, sites=sites, options=told)


def _few(sites: Sequence[str]) -> str:
    return ", ".join(sites[:2]) + (f" and {len(sites) - 2} more" if len(sites) > 2 else "")


def _whole_blocks(draft: _Draft) -> None:
    """For the stock class: no rewrite that it can't build, and blocks whole or gone."""
    for rewrite in dict.fromkeys(r.rewrite for r in draft.receipts):
        kinds = {s["kind"] for r in draft.receipts if r.rewrite == rewrite for s in r.structure.get("steps", ())}
        uneven = kinds & {"narrow", "resize"} and not _even(draft, rewrite)
        if kinds & {"swap", "share", "attend", "layout"} or uneven:
            draft.leave_out(rewrite)
    for stack in draft.anatomy.stacks:
        for block in stack.blocks:
            out = draft.anatomy.expand(draft.gone)
            parts = {x.site.id for x in block.branches}
            if parts & out and not parts <= out:
                draft.keep_or_drop(block.site.id)


def _even(draft: _Draft, rewrite: str) -> bool:
    """Whether a rewrite cuts as many units of each kind from every block that has them and stays."""
    widths: dict[str, set[int]] = {}
    gone = {s: len(n) for step in draft.steps if step.rewrite == rewrite for s, n in _gone(step).items()}
    out = draft.anatomy.expand(draft.gone)
    for site in gone:
        unit = site.split(".", 2)[-1]
        for other in draft.anatomy.sublayers:
            name = f"{other.id.rsplit('.', 1)[0]}.{unit}"
            if name.startswith(f"{other.id}.") and other.id not in out:
                widths.setdefault(unit, set()).add(gone.get(name, 0))
    return all(len(counts) == 1 for counts in widths.values())


def _gone(step: Step) -> Mapping[str, Sequence[int]]:
    found = step.options.get("gone", {})
    return found if isinstance(found, Mapping) else {}


def _fitting(draft: _Draft) -> None:
    """For GGUF: no rewrite that it can't hold."""
    from lamina.anatomy.families import llama_gguf as family

    for rewrite in dict.fromkeys(s.rewrite for s in draft.steps):
        if family.REWRITES.get(rewrite, "unknown"):
            draft.leave_out(rewrite)


def _decilm(draft: _Draft) -> None:
    """For DeciLM: the same, as many heads in all blocks, widths that can be said, and a first block that attends."""
    _fitting(draft)
    for step in [s for s in draft.steps if _gone(s)]:
        units = {s.rsplit(".", 1)[-1] for s in step.sites}
        if units & {Kind.HEAD.value, Kind.KV_GROUP.value} and not _even(draft, step.rewrite):
            draft.leave_out(step.rewrite)
        elif Kind.NEURON.value in units:
            _shorten(draft, step)
    while (block := _headless(draft)) is not None:
        draft.keep_or_drop(block, first=True)


def _shorten(draft: _Draft, step: Step) -> None:
    """Cut fewer neurons, up to the next width that the config can say; those named last stay."""
    from lamina.exporters._deci_rules import nearest_width

    gone = dict(_gone(step))
    for site in [s for s in step.sites if s.endswith(f".{Kind.NEURON.value}") and s in gone]:
        known = draft.anatomy.site(site)
        width = known.width - len(gone[site])
        near = nearest_width(width)
        if near != width:
            each = draft.anatomy.cost(known).parameters
            gone[site] = list(gone[site])[: known.width - near]
            draft.parameters += each * (near - width)
            draft.changes.append(f"narrow {site} to {near}")
    sites = tuple(s for s in step.sites if gone.get(s))
    new = dataclasses.replace(_on(step, sites), options={**step.options, "gone": {s: gone[s] for s in sites}})
    place = draft.steps.index(step)
    draft.steps[place : place + 1] = [new] if sites else []


def _headless(draft: _Draft) -> str | None:
    """The first block that stays, if it has lost its attention."""
    out = draft.anatomy.expand(draft.gone)
    for block in draft.anatomy.stacks[0].blocks:
        if any(x.site.id not in out for x in block.branches):
            lost = any(x.site.id in out and x.site.kind is Kind.ATTENTION for x in block.branches)
            return block.site.id if lost else None
    return None


FIXES: Mapping[str, Callable[[_Draft], None]] = {
    "transformers": _whole_blocks,
    "shim": lambda draft: None,
    "vllm": _decilm,
    "tensorrt-llm": _decilm,
    "llama.cpp": _fitting,
    "ollama": _fitting,
    "onnxruntime": lambda draft: None,
}
"""Target → what changes a draft until it loads it, if any plan does."""
