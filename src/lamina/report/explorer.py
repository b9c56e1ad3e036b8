"""The data of the explorer: sites, scores, options and the plan, small enough for one page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from lamina.core.documents import plain
from lamina.core.menu import Option
from lamina.core.sites import Kind, depth_key
from lamina.report import facts
from lamina.report.choices import COUNTS, Choices, choices, exclusive, taken
from lamina.report.flow import PACKED, Texts, flow
from lamina.report.inside import inside
from lamina.report.numbers import named
from lamina.report.read import Place, Run, SiteScores
from lamina.report.strip import rows_of
from lamina.report.svg import DARK, LIGHT, Scale, palette

MOST = 2_300_000
"""Bytes of data that the page holds at most: with the rest of it under 3 MB."""
WORDS = {"macs": "multiply-adds per token", "bytes": "bytes of weights"}


def payload(run: Run, shown: str = "") -> dict[str, Any] | None:
    """All that the explorer shows, as plain data; None where the folder has neither survey nor menu.

    `shown` is the measure that colours the sites at first; else the one that scores most of them does.
    """
    survey = run.survey or SiteScores()
    texts = Texts()
    found = choices(run, {k: v for k, v in _dense(run).items() if v}, texts)
    sites = _sites(survey, found.options)
    if not sites:
        return None
    data: dict[str, Any] = {"shown": shown, **_chart(survey, sites), **_document(run), "notes": []}
    data["palette"] = {"light": palette(LIGHT), "dark": palette(DARK)}
    used = {s: n for n, s in enumerate(data["ids"])}
    picked, other = taken(found, run.plan, texts)
    data |= _options(found, picked, used)
    data["other"] = [[texts.step(s), {k: number(v) for k, v in s.why.items()}] for s in other]
    data["protect"] = [n for s, n in used.items() if _held(s, _protected(run))]
    data["inside"], note = inside(run.folder / "survey.parquet", used, MOST - len(encoded(data)))
    data["notes"] += [note] if note else []
    return data


def encoded(data: Any) -> str:
    """JSON that may stand in a `<script>`: nothing in it ends the element or begins a comment."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def island(data: Any) -> Markup:
    """The data as the page holds them."""
    return Markup('<script type="application/json" id="lamina-data">{}</script>').format(Markup(encoded(data)))


def number(value: float, digits: int = 6) -> float | int | None:
    """A number in as few signs as so many digits take; None for what is none."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    if value == int(value) and abs(value) < 2**53:
        return int(value)
    return int(short) if short == int(short) and abs(short) < 2**53 else short


def _dense(run: Run) -> dict[str, float]:
    return {key: pair[0] for key in COUNTS if (pair := facts.sides(run.receipts, run.evidence, key))}


def _sites(survey: SiteScores, options: Sequence[Option]) -> list[Place]:
    """Every block and sublayer that is scored or can be changed, in depth order."""
    known = {*survey.kinds, *(g for o in options for g in o.groups)}
    found = {p.id: p for p in map(Place.of, known) if p}
    for place in list(found.values()):
        found.setdefault(place.whole, Place(place.whole, place.stack, place.block, Kind.BLOCK.value))
    return [found[s] for s in sorted(found, key=depth_key)]


def _chart(survey: SiteScores, sites: Sequence[Place]) -> dict[str, Any]:
    """Stacks, rows, sites with their places, and every measure."""
    stacks = list(dict.fromkeys(p.stack for p in sites))
    lines = rows_of(sites)
    row = {kind: n for n, (_, kinds) in enumerate(lines) for kind in kinds}
    measures = []
    for name, scores in survey.scores.items():
        scale = Scale.of([s.value for s in scores.values()])
        values = [scores.get(p.id) for p in sites]
        measures.append(
            {
                "name": name, "unit": survey.scales.get(name, ""), **scale_data(scale),
                "v": [None if s is None else number(s.value, 4) for s in values],
                "e": [None if s is None or s.stderr is None else number(s.stderr, 2) for s in values],
            }
        )  # fmt: skip
    costs = [survey.costs.get(p.id) for p in sites]
    return {
        "ids": [p.id for p in sites],
        "at": [[stacks.index(p.stack), p.block, row[p.kind]] for p in sites],
        "cost": [[getattr(c, k) for k in COUNTS] if c else None for c in costs],
        "stacks": stacks,
        "rows": [label for label, _ in lines],
        "measures": measures,
    }


def scale_data(scale: Scale) -> dict[str, Any]:
    """A colour scale as the page reads it."""
    return {"how": scale.how, "low": scale.low, "high": scale.high, "bend": scale.bend}


def _document(run: Run) -> dict[str, Any]:
    """What heads a plan, as YAML, or why no plan can be written here."""
    plan, recipe = run.plan, run.recipe
    prints = run.survey.about["fingerprint"] if run.survey else ()
    if plan is not None:
        model, name, budget = plain(plan.model), plan.recipe, plain(plan.budget)
    elif recipe is not None and prints and prints[0]:
        model, name, budget = {"name": recipe.model, "fingerprint": prints[0]}, recipe.name, plain(recipe.budget)
    else:
        return {"head": None, "why_not": "no plan and no recipe in the folder says which model this is"}
    head = {"model": flow(model), "recipe": flow(name), "budget": flow(budget)}
    loss = plan.expects.get("loss") if plan else None
    asked = plan.budget if plan else recipe.budget if recipe else None
    return {
        "head": head | {"protect": flow(_protected(run))},
        "expected": loss,
        "asked": asked.resource if asked else "",
    }


def _protected(run: Run) -> list[str]:
    budget = run.plan.budget if run.plan else run.recipe.budget if run.recipe else None
    return list(budget.protect) if budget else []


def _held(site: str, protected: Sequence[str]) -> bool:
    return any(site == p or site.startswith(p + ".") for p in protected)


def _options(found: Choices, picked: Sequence[int], used: Mapping[str, int]) -> dict[str, Any]:
    """The options, what they are of, and the plan's own choice. Each different text and name stands once."""
    extra = sorted({g for o in found.options for g in o.groups} - {*used}, key=depth_key)
    places = {**used, **{g: len(used) + n for n, g in enumerate(extra)}}
    resources = [k for k in (*COUNTS, *(k for k in found.whole if "@" in k)) if found.whole.get(k)]
    kept, gone = _fitting(found, picked)
    pieces = list(dict.fromkeys(text for n in kept for text in found.texts[n]))
    names = list(dict.fromkeys(found.options[n].name for n in kept))
    at = {text: i for i, text in enumerate(pieces)}, {name: i for i, name in enumerate(names)}
    rows = []
    for n in kept:
        option = found.options[n]
        steps = [[at[0][found.texts[n][i]], *_reasons(option, i, found)] for i in range(len(option.steps))]
        price = number(found.prices[n]) if found.prices else 0
        saves = [number(option.saves.get(k, 0.0)) for k in resources]
        rows.append(
            {"n": at[1][option.name], "g": [places[g] for g in option.groups], "d": price, "s": saves, "p": steps}
        )
    order = {n: i for i, n in enumerate(kept)}
    told = [
        {"key": k, "label": WORDS.get(k, named(k)), "whole": number(found.whole[k]), "unknown": found.unknown.get(k, 0)}
        for k in resources
    ]
    return {
        "extra": extra, "names": names, "options": rows, "plan": [order[n] for n in picked], "pieces": pieces,
        "sets": [[order[n] for n in group] for group in exclusive(found.options) if all(n in order for n in group)],
        "priced": found.prices is not None, "source": found.source, "level": found.level,
        "partial": found.partial, "left_out": gone, "resources": told,
    }  # fmt: skip


def _reasons(option: Option, n: int, found: Choices) -> list[Any]:
    """Of a step of an option: its price or None, and what else it says; 0 where that is what the option saves."""
    step = option.steps[n]
    told = step.why.get("damage")
    price = None if told is None else number(told * found.factors.get(step.rewrite, 1.0) * found.level)
    extra = {} if n else {k: v for k, v in option.saves.items() if "@" in k and v}
    why = {k: v for k, v in {**step.why, **extra}.items() if k != "damage"}
    same = len(option.steps) == 1 and why == {k: v for k, v in option.saves.items() if v}
    return [price, 0 if same else {k: number(v) for k, v in why.items()}]


def _fitting(found: Choices, picked: Sequence[int]) -> tuple[list[int], list[str]]:
    """The options that fit the page, and those left out, by name: the longest lists go first, but never a plan's."""
    mine = [[t for t in texts if PACKED in t] for texts in found.texts]
    sizes = {t: len(t) for texts in mine for t in texts}
    held = {t for n in picked for t in mine[n]}
    size, lost = sum(sizes.values()) + 140 * len(mine), set[str]()
    for text in sorted(sizes, key=lambda t: -sizes[t]):
        if size > MOST and text not in held:
            lost.add(text)
            size -= sizes[text]
    kept = [n for n, texts in enumerate(mine) if not lost & {*texts}]
    gone: dict[str, int] = {}
    for n in sorted({*range(len(mine))} - {*kept}):
        gone[found.options[n].name] = gone.get(found.options[n].name, 0) + 1
    return kept, [f"{name} ({count})" for name, count in gone.items()]


SOURCES = {
    "tried": "Prices are those of the menu, put right by the trials of the last plan; damage is their sum.",
    "menu": "Prices are those of the menu, of one change at a time; damage is their sum, and what is done together "
    "may cost more or less.",
    "damage": "There is no menu: only drops can be chosen, at the prices that the measure damage gives; damage is "
    "their sum, and what is done together may cost more or less.",
    "": "There is neither a menu nor the measure damage in this folder: resources can be counted, but nothing is said "
    "of damage.",
}


def note(data: Mapping[str, Any]) -> str:
    """What the predictions rest on, and what is missing on the page."""
    said = [SOURCES[data["source"]]]
    if data["source"] in ("tried", "menu"):
        said.append("lamina plan solves the same choice exactly, under several budgets too, and tries what it finds.")
    if data["partial"]:
        said.append("Costs of the whole model are not known here: shares are of the sublayers alone.")
    said += [
        f"Of {r['unknown']} options the {r['label']} is not known and counts as unchanged."
        for r in data["resources"]
        if r["unknown"]
    ]
    if data["left_out"]:
        said.append(f"Left out, since the page would be too large: {', '.join(data['left_out'])}.")
    return " ".join([*said, *(f"{n[:1].upper()}{n[1:]}." for n in data["notes"])])


def export_note(data: Mapping[str, Any]) -> str:
    """What the written plan leaves out."""
    if data["head"] is None:
        return f"No plan can be written here: {data['why_not']}."
    if data["other"]:
        steps = f"{len(data['other'])} steps of the run's plan are no choices of this page"
        return f"{steps}; another choice than the plan's is written without them."
    return ""
