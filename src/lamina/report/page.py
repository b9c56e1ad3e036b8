"""The page: everything put into the template, and written atomically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from lamina.core.files import to_yaml, write_text
from lamina.core.sites import depth_key
from lamina.report import charts, explorer, facts, methods, proofs, scripts, strip
from lamina.report.numbers import DASH, count, data, macs, percent, significant
from lamina.report.read import Run, SiteScores, read_run
from lamina.report.svg import DARK, LIGHT, palette_css

HERE = Path(__file__).parent
MISSING = {
    "survey": "not surveyed yet: run lamina survey",
    "plan": "not planned yet: run lamina plan",
    "receipts": "not applied yet: run lamina apply",
    "evidence": "not measured yet: run lamina prove",
}


def write(folder: Path) -> Path:
    """Write `report.html` into the run folder; the same folder gives the same bytes."""
    path = Path(folder) / "report.html"
    write_text(path, render(read_run(Path(folder))))
    return path


def render(run: Run) -> str:
    """The page of a run, as HTML."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["percent"] = percent
    environment.filters["whole"] = whole
    return environment.get_template("template.html.j2").render(context(run))


def whole(sentence: str) -> Markup:
    """A sentence that does not break inside an interval."""
    words = (Markup('<span class="whole">{}</span>').format(w) if DASH in w else escape(w) for w in sentence.split(" "))
    return Markup(" ").join(words)


def context(run: Run) -> dict[str, Any]:
    """The template's names."""
    row = methods.find_row(run)
    measure, note = methods.measure_shown(run, row)
    used = methods.methods(run, row)
    asked = run.plan.budget if run.plan else run.recipe.budget if run.recipe else None
    evidence = run.evidence
    data = explorer.payload(run, measure if row and row.measure == measure else "")
    script = scripts.script(explorer=data is not None)
    return {
        "css": css(),
        "data": explorer.island(data) if data else None,
        "script": Markup(script),
        "explorer_note": f"{explorer.note(data)} {facts.forecast(run)}".strip() if data else "",
        "export_note": explorer.export_note(data) if data else "",
        "policy": scripts.policy(script),
        "tasks": proofs.tasks(evidence) if evidence else [],
        "task_chart": proofs.task_chart(evidence) if evidence else None,
        "speeds": proofs.speeds(run),
        "ladder": proofs.ladder(run.folder),
        "run": run,
        "missing": MISSING,
        "asked": facts.budget(asked) if asked else "",
        "protect": asked.protect if asked else (),
        "recipe_name": methods.recipe_name(run),
        "verdict": facts.verdict(run),
        "measure_note": note,
        "panels": strip.panels(run, measure) if run.survey or run.plan else [],
        "score_table": score_table(run) if run.survey else None,
        "costs": facts.costs(run),
        "bars": charts.bars,
        "share_bar": charts.share_bar,
        "rows": facts.table(evidence) if evidence else [],
        "ratio_chart": _ratio_chart(run),
        "loss_chart": _loss_chart(run),
        "forecast": facts.forecast(run),
        "decisions": methods.decisions(run.plan) if run.plan else ([], [], ""),
        "expects": methods.expects(run.plan) if run.plan else [],
        "healing": facts.healing(run.receipts.healed) if run.receipts else [],
        "healing_chart": _healing_chart(run),
        "checks": facts.checks(evidence) if evidence else [],
        "methods": used,
        "papers": methods.papers(used),
        "commands": methods.commands(run.recipe) if run.recipe else [],
        "recipe_text": to_yaml(run.recipe.to_data()) if run.recipe else "",
        "fingerprints": methods.fingerprints(run),
    }


def css() -> Markup:
    """The style sheet with both palettes; our own text, so it goes in as it is."""
    style = (HERE / "style.css").read_text(encoding="utf-8")
    asked, chosen = ":root:not([data-theme=light]) ", ":root[data-theme=dark] "
    dark = f"@media screen and (prefers-color-scheme: dark){{{palette_css(DARK, asked)}}}"
    return Markup("\n".join((style, palette_css(LIGHT), dark, f"@media screen{{{palette_css(DARK, chosen)}}}")))


def score_table(run: Run) -> tuple[list[str], list[tuple[str, list[str], str, str]]]:
    """Every site with its scores, its costs and its fate: the strip for those who can't hover."""
    survey = run.survey or SiteScores()
    marks = strip.Marks.of(run.plan)
    sites = sorted(survey.kinds, key=depth_key)
    rows: list[tuple[str, list[str], str, str]] = []
    for site in sites:
        place = strip.Place.of(site)
        state, words = marks.fate(place, survey.inside(site)) if place else ("kept", "kept")
        cost = survey.costs[site]
        cells = [_score(survey, measure, site) for measure in survey.scores]
        cells += [count(cost.parameters), macs(cost.macs), data(cost.kv_bytes)]
        rows.append((site, cells, words, state))
    heads = [m + (f" ({survey.scales[m]})" if survey.scales.get(m) else "") for m in survey.scores]
    return [*heads, "parameters", "MACs", "KV"], rows


def _score(survey: SiteScores, measure: str, site: str) -> str:
    score = survey.scores[measure].get(site)
    if score is None:
        return "–"
    return significant(score.value) + ("" if score.stderr is None else f" ± {significant(score.stderr, 2)}")


def _ratio_chart(run: Run) -> Markup | None:
    dots = facts.ratio_dots(run.evidence) if run.evidence else []
    if not dots:
        return None
    return charts.intervals(dots, reference=1.0, log=True, name="Ratios to the dense model", reference_name="dense")


def _loss_chart(run: Run) -> Markup | None:
    dots = facts.loss_dots(run) if run.evidence else []
    if not dots:
        return None
    name = "Nats per token"
    return charts.intervals(dots, reference=0.0, log=False, name=name, reference_name="no change")


def _healing_chart(run: Run) -> Markup | None:
    points = facts.history(run.receipts.healed) if run.receipts else []
    return charts.curve(points) if len(points) > 1 else None
