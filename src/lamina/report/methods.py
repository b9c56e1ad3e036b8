"""The plan as rows, the methods with their citations, and how to run it again."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lamina.core import registry
from lamina.core.documents import Plan, Recipe
from lamina.core.errors import InputError
from lamina.core.papers import Paper
from lamina.report.numbers import NONE, count, data, fixed, signed, significant
from lamina.report.read import Run

SHOWN = 16
"""Of longer lists among a step's options so many are shown."""


@dataclass(frozen=True)
class Method:
    """One method that took part."""

    role: str
    name: str
    summary: str
    status: str
    deviations: tuple[str, ...] = ()
    paper: Paper | None = None

    @property
    def link(self) -> str:
        """The paper's address, where it is one that a browser may open."""
        link = self.paper.link if self.paper else ""
        return link if link.startswith(("https://", "http://")) else ""

    @property
    def citation(self) -> str:
        """Authors, year, title and venue in one line."""
        if self.paper is None:
            return ""
        names = self.paper.authors
        who = " and ".join(names) if len(names) <= 2 else f"{names[0]} et al."
        where = self.paper.venue or (f"arXiv:{self.paper.arxiv}" if self.paper.arxiv else "")
        return f"{who} ({self.paper.year}). {self.paper.title}." + (f" {where}." if where else "")


def recipe_name(run: Run) -> str:
    """The recipe's name, as the plan or the recipe has it."""
    return run.plan.recipe if run.plan else run.recipe.name if run.recipe else ""


def find_row(run: Run) -> registry.Row | None:
    """The recipe row, or None where this installation does not know it."""
    try:
        return registry.row(recipe_name(run))
    except (InputError, ImportError):
        return None


def methods(run: Run, found: registry.Row | None) -> list[Method]:
    """The recipe and its measure, planner, rewrites and healer, each with its paper and status."""
    if found is None:
        return []
    made = [Method("recipe", found.name, found.summary, found.status, found.deviations, found.paper)]
    parts: list[tuple[registry.Registry, str]] = [
        (registry.MEASURES, found.measure),
        (registry.PLANNERS, found.planner),
    ]
    rewrites = [step.rewrite for step in run.plan.steps] if run.plan else [found.rewrite]
    parts += [(registry.REWRITES, name) for name in dict.fromkeys(rewrites)]
    healed = run.receipts.healed if run.receipts else {}
    if healed:
        name = healed.get("healer") or (run.recipe.heal.healer if run.recipe and run.recipe.heal else "")
        parts += [(registry.HEALERS, str(name))] if name else []
    return made + [_method(role, name) for role, name in parts if name]


def _method(role: registry.Registry, name: str) -> Method:
    try:
        card = role.card(name)
    except InputError:
        return Method(role.role, name, "Not known to this installation of lamina.", "unknown")
    return Method(card.role, card.name, card.summary, card.status, card.deviations, card.paper)


def papers(used: Iterable[Method]) -> list[Paper]:
    """Each paper once, in order of use."""
    return list({m.paper.key: m.paper for m in used if m.paper is not None}.values())


def measure_shown(run: Run, found: registry.Row | None) -> tuple[str, str]:
    """The measure of the large strip, and a line where that is not the recipe's own."""
    scores = run.survey.scores if run.survey else {}
    if not scores:
        return "", ""
    if found is not None and found.measure in scores:
        return found.measure, ""
    nats = [m for m in scores if run.survey and run.survey.scales.get(m) == "nats"]
    name = (nats or list(scores))[0]
    if found is not None and not found.measure:
        return name, ""
    if found is not None:
        return name, f"The recipe's measure, {found.measure}, is not in the survey; {name} is shown instead."
    return name, "" if len(scores) == 1 else f"The recipe is not known here; {name} is shown first."


@dataclass(frozen=True)
class Decision:
    """One step of the plan."""

    number: int
    rewrite: str
    sites: tuple[str, ...]
    options: str
    why: tuple[str, ...]
    share: float


def _worded(value: Any) -> str:
    """An option's value in words; of long lists the first of them and how many they are."""
    if isinstance(value, Mapping):
        return "; ".join(f"{k}: {_worded(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        shown = " ".join(map(str, value[:SHOWN]))
        return shown if len(value) <= SHOWN else f"{shown} … ({len(value)} in all)"
    return str(value)


def decisions(plan: Plan) -> tuple[list[str], list[Decision], str]:
    """The reasons' names (columns), the steps (rows) and the reason that is drawn as a bar, if any."""
    columns = list(dict.fromkeys(key for step in plan.steps for key in step.why))
    drawn = next((c for c in ("damage", *columns) if c in columns), "")
    sizes = [step.why.get(drawn, 0.0) for step in plan.steps]
    most = max(sizes, default=0.0)
    drawn = drawn if most > 0 and min(sizes) >= 0 and len(sizes) > 1 else ""
    rows = [
        Decision(
            number=n,
            rewrite=step.rewrite,
            sites=step.sites,
            options=", ".join(f"{k} {_worded(v)}" for k, v in step.options.items()),
            why=tuple(significant(step.why[c]) if c in step.why else NONE for c in columns),
            share=sizes[n - 1] / most if drawn else 0.0,
        )
        for n, step in enumerate(plan.steps, 1)
    ]
    return columns, rows, drawn


def expects(plan: Plan) -> list[tuple[str, str]]:
    """What the plan promised, formatted by name."""
    say = {"loss": lambda v: signed(v) + " nats/token", "parameters": count, "bytes": data, "kv_bytes": data}
    say["sublayers"] = say["blocks"] = lambda v: fixed(v, 0)
    return [(key.replace("_", " "), say.get(key, significant)(value)) for key, value in plan.expects.items()]


def commands(recipe: Recipe) -> list[str]:
    """Command lines that make this run again, from its recipe, and that only print this page again."""
    asked = recipe.budget
    parts = ["lamina", "thin", recipe.model or "MODEL"]
    share = asked.keep
    if share is not None:
        parts += ["--keep", f"{100 * share:.6g}%"]
    plain_budget = share is not None and asked.metric == "parameters" and not asked.protect
    plain_recipe = Recipe(name=recipe.name, model=recipe.model, budget=asked)
    if plain_budget and recipe == plain_recipe and recipe.name == "default":
        return [shlex.join(parts)]
    return ["lamina thin --recipe recipe.yaml"]


def fingerprints(run: Run) -> list[tuple[str, str]]:
    """What was read and made, by hash; and the seeds."""
    rows: list[tuple[str, str]] = []
    reference = run.plan.model if run.plan else run.receipts.model if run.receipts else None
    if reference is not None:
        rows.append(("model", reference.fingerprint))
    if run.receipts is not None:
        rows.append(("plan", run.receipts.plan))
    if run.survey is not None:
        rows += [("survey's inputs", str(value)) for value in run.survey.about["fingerprint"] if value]
        rows += [("tokens surveyed", fixed(float(n), 0)) for n in run.survey.about["tokens"] if n]
        rows.append(("seed of the survey", _numbers(run.survey.about["seed"])))
    if run.recipe is not None:
        rows.append(("seed of the recipe", str(run.recipe.seed)))
    if run.evidence is not None and run.evidence.evidence:
        rows.append(("seed of the evidence", _numbers(e.seed for e in run.evidence.evidence)))
    return rows


def _numbers(values: Iterable[object]) -> str:
    return ", ".join(str(v) for v in dict.fromkeys(values) if v is not None) or NONE
