"""What the page lets people choose from: the options of a menu, or drops of what was surveyed, priced and packed."""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field

from lamina.core.documents import Plan, Step
from lamina.core.menu import Menu, Option, Solved, Times, repriced
from lamina.core.sites import Kind
from lamina.report.flow import Texts
from lamina.report.read import Place, Run, SiteScores

COUNTS = ("parameters", "bytes", "macs", "kv_bytes")
FLOOR = 1e-5
"""The least price, in nats: none is predicted to help."""
_KEPT = re.compile(r"narrow to (\d+) of (\d+) ")


@dataclass(frozen=True)
class Choices:
    """Options with their final prices in nats, what the dense model takes of each resource, and where prices are from.

    `texts`: each option's steps as text.
    `prices` is None where nothing is known of damage. `unknown`: resource → options whose share of it is not known.
    """

    options: tuple[Option, ...] = ()
    texts: tuple[tuple[str, ...], ...] = ()
    prices: tuple[float, ...] | None = None
    whole: Mapping[str, float] = field(default_factory=dict[str, float])
    source: str = ""
    level: float = 1.0
    factors: Mapping[str, float] = field(default_factory=dict[str, float])
    partial: bool = False
    unknown: Mapping[str, int] = field(default_factory=dict[str, int])


def choices(run: Run, whole: Mapping[str, float], texts: Texts) -> Choices:
    """What may be chosen in a run; `whole` is what receipts or evidence say of the dense model."""
    if run.menu is not None and run.menu.options:
        return _of_menu(run.menu, run.solved, run.times, texts)
    return _of_survey(run.survey or SiteScores(), whole, texts)


def _of_menu(menu: Menu, solved: Solved | None, times: Mapping[str, Times], texts: Texts) -> Choices:
    """The menu's options, each once, at the prices that the last plan's trials led to, with measured seconds."""
    once: dict[tuple[object, ...], tuple[Option, tuple[str, ...]]] = {}
    for option in menu.options:
        said = tuple(texts.step(s, option.groups[0]) for s in option.steps)
        once.setdefault((option.groups, said), (option, said))
    options = [option for option, _ in once.values()]
    whole = dict(menu.whole)
    unknown = dict[str, int]()
    for resource, table in times.items():
        if table.of != menu.of:
            continue
        whole[resource] = table.total
        seconds = [_seconds(table, o) for o in options]
        unknown[resource] = sum(s is None for s in seconds)
        options = [
            Option(name=o.name, groups=o.groups, steps=o.steps, damage=o.damage, saves={**o.saves, resource: s or 0.0})
            for o, s in zip(options, seconds, strict=True)
        ]
    tried = solved if solved is not None and solved.of == menu.of else None
    factors, level = (dict(tried.factors), tried.level) if tried else ({}, 1.0)
    prices = tuple(level * p for p in repriced(options, factors))
    source = "tried" if tried and tried.rises else "menu"
    said = tuple(s for _, s in once.values())
    unknown = {k: n for k, n in unknown.items() if n}
    return Choices(tuple(options), said, prices, whole, source, level, factors, unknown=unknown)


def _seconds(times: Times, option: Option) -> float | None:
    """What an option saves of a timed work; None where a change like it was not timed.

    The table names changes by kind and shapes of the sublayer. Shapes are not known here, so a change is taken only
    where all sublayers of the kind have it under one name.
    """
    freed = 0.0
    for group in option.groups:
        told = "; ".join(filter(None, (_told(s, option.name) for s in option.steps)))
        if option.kinds == ("drop",):
            freed += times.sites.get(group, 0.0)
        elif told:
            kind = group.rpartition(".")[2]
            left = [v for k, v in times.left.items() if k.startswith(kind + " ") and k.endswith("]: " + told)]
            if len(left) != 1:
                return None
            freed += times.sites.get(group, 0.0) * (1 - left[0])
    return freed


def _told(step: Step, name: str) -> str:
    """A step's name in the table of times; "" where shapes stay. `narrow` is told by the option's name."""
    kept = _KEPT.match(name)
    if step.rewrite == "narrow" and kept:
        return ", ".join(f"{s.rpartition('.')[2]} {kept[1]}" for s in step.sites)
    ranks = step.options.get("rank")
    if isinstance(ranks, Mapping):
        return f"ranks {[ranks[s] for s in step.sites]}"
    return "" if "type" in step.options else f"{step.rewrite} {dict(step.options)}"


def _of_survey(survey: SiteScores, whole: Mapping[str, float], texts: Texts) -> Choices:
    """Without a menu: each sublayer may be dropped, at the price that the measure `damage` gives."""
    sites = places(survey)
    told = survey.scores.get("damage", {}) if survey.scales.get("damage") == "nats" else {}
    priced = bool(told) and all(s in told for s in sites)
    options: list[Option] = []
    for site in sites:
        cost = survey.costs[site]
        saves = {name: float(getattr(cost, name)) for name in COUNTS}
        damage = max(told[site].value, FLOOR) if priced else 0.0
        why = {**({"damage": damage} if priced else {}), **{k: v for k, v in saves.items() if v}}
        step = Step(rewrite="drop", sites=(site,), why=why)
        options.append(Option(name="drop", groups=(site,), steps=(step,), damage=damage, saves=saves))
    known = {k: v for k, v in whole.items() if k in COUNTS and v}
    summed = {name: sum(o.saves[name] for o in options) for name in COUNTS}
    prices = tuple(o.damage for o in options) if priced else None
    said = tuple((texts.step(o.steps[0], o.groups[0]),) for o in options)
    return Choices(
        tuple(options), said, prices, {**summed, **known}, "damage" if priced else "", partial=len(known) < len(COUNTS)
    )


def places(survey: SiteScores) -> list[str]:
    """The sublayers; of blocks whose sublayers the survey does not name, the block."""
    inner = [s for s, kind in survey.kinds.items() if kind != Kind.BLOCK]
    held = {p.whole for p in map(Place.of, inner) if p}
    return inner + [s for s, kind in survey.kinds.items() if kind == Kind.BLOCK and s not in held]


def exclusive(options: Sequence[Option]) -> list[list[int]]:
    """Sets of drops that can't all be taken: of all sublayers of a stack, and of all that keep a cache."""
    drops = {o.groups[0]: n for n, o in enumerate(options) if o.kinds == ("drop",)}
    stacks: dict[str, set[str]] = {}
    cached = set[str]()
    for option in options:
        for group in option.groups:
            place = Place.of(group)
            stacks.setdefault(place.stack if place else "", set()).add(group)
        if option.kinds == ("drop",) and option.saves.get("kv_bytes", 0.0) > 0:
            cached.add(option.groups[0])
    sets = [*stacks.values(), cached]
    return [sorted(drops[s] for s in group) for group in sets if group and all(s in drops for s in group)]


def taken(found: Choices, plan: Plan | None, texts: Texts) -> tuple[list[int], list[Step]]:
    """The options that a plan took, and its steps that no option has. Drops of whole blocks count as of their parts."""
    if plan is None:
        return [], []
    groups = dict.fromkeys(g for o in found.options for g in o.groups)
    waiting: dict[tuple[str, str], Step] = {}
    for step in [part for whole in plan.steps for part in _parts(whole, groups)]:
        place = _place(step, groups)
        waiting[place, texts.step(step, place)] = step
    mine: dict[str, int] = {}
    for n in sorted(range(len(found.options)), key=lambda n: -len(found.options[n].steps)):
        places = found.options[n].groups
        keys = [(places[0], text) for text in found.texts[n]]
        if all(k in waiting for k in keys) and not any(g in mine for g in places):
            mine.update(dict.fromkeys(places, n))
            for key in keys:
                del waiting[key]
    return sorted(set(mine.values())), list(waiting.values())


def _place(step: Step, groups: Container[str]) -> str:
    """The place that a step's first site lies in; "" where no option has it."""
    parts = step.sites[0].split(".") if step.sites else []
    ends = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((site for site in ends if site in groups), "")


def _parts(step: Step, groups: Collection[str]) -> list[Step]:
    """A drop as drops of single places; other steps as they are."""
    if step.rewrite != "drop" or step.options:
        return [step]
    inner = [[s] if s in groups else [k for k in groups if k.startswith(s + ".")] or [s] for s in step.sites]
    return [Step(rewrite="drop", sites=(site,)) for sites in inner for site in sites]
