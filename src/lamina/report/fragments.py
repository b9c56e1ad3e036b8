"""Pieces of HTML for notebooks: a survey, a plan, what was measured. Each stands alone, with its own style."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from markupsafe import Markup

from lamina.core.documents import Document, EvidenceFile, Plan
from lamina.core.errors import InputError
from lamina.report import charts, facts, methods, proofs
from lamina.report.numbers import NONE

D = TypeVar("D", bound=Document)
STYLE = Markup(
    "<style>.lamina-piece{--data:#3b82b5;--soft:#7d838d;--rule:#9a9a9a55;max-width:960px}"
    ".lamina-piece table{border-collapse:collapse;margin:6px 0}"
    ".lamina-piece th,.lamina-piece td{text-align:left;padding:3px 14px 3px 0;border-bottom:1px solid var(--rule);"
    "vertical-align:top}.lamina-piece .n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}"
    ".lamina-piece p{margin:4px 0}.lamina-piece svg{max-width:520px;display:block;overflow:visible}"
    ".lamina-piece svg text{fill:currentColor;font-size:12px;font-family:sans-serif}"
    ".lamina-piece .grid{stroke:var(--rule)}.lamina-piece .reference{stroke:var(--soft)}"
    ".lamina-piece .whisker{stroke:var(--data);stroke-width:2}.lamina-piece .dot{fill:var(--data)}"
    ".lamina-piece .dot.predicted{fill:none;stroke:var(--data);stroke-width:2}</style>"
)


def survey_html(folder: Path | str) -> str:
    """A run folder's survey: what each measure scores lowest, and all measures by depth.

    Raises `InputError` where the folder holds no survey.
    """
    from lamina.report.survey import Survey

    return Survey.open(folder)._repr_html_()


def plan_html(source: Plan | Path | str) -> str:
    """A plan, or a run folder's: what was asked, its steps with their reasons, and what it should cost.

    Raises `InputError` where the folder holds no plan.
    """
    plan = source if isinstance(source, Plan) else _load(Plan, source, "plan.yaml", "plan")
    heads, rows, _ = methods.decisions(plan)
    body = [[str(r.number), r.rewrite, " ".join(r.sites), _clip(r.options), *r.why] for r in rows]
    head = Markup("<p><b>{}</b>: {}, recipe {}</p>").format(plan.model.name, facts.budget(plan.budget), plan.recipe)
    steps = _table(["step", "rewrite", "sites", "options", *heads], body) if body else Markup("<p>no step</p>")
    told = "; ".join(f"{name} {value}" for name, value in methods.expects(plan))
    return _piece(head, steps, Markup("<p>expected: {}</p>").format(told) if told else Markup(""))


def evidence_html(source: EvidenceFile | Path | str) -> str:
    """What was measured, or a run folder's: dense and thinned, intervals as a picture, tasks, the reload contract.

    Raises `InputError` where the folder holds no evidence.
    """
    file = source if isinstance(source, EvidenceFile) else _load(EvidenceFile, source, "evidence.json", "prove")
    rows = [[r.label, r.dense, r.thinned, r.change, r.inside, r.n] for r in facts.table(file)]
    dots = facts.ratio_dots(file)
    axis = {"reference": 1.0, "log": True, "name": "Ratios to the dense model", "reference_name": "dense"}
    drawn = charts.intervals(dots, **axis) if dots else Markup("")
    worded = {True: "passed", False: "failed", None: "measured"}
    checks = [[c.label, worded[c.passed], c.shown] for c in facts.checks(file)]
    heads = ["dense", "thinned", "change", "95 %"]
    return _piece(
        _table(["", *heads, "n"], rows) if rows else Markup(""),
        drawn,
        _tasks(file, heads),
        _table(["reload contract", "", ""], checks) if checks else Markup(""),
    )


def _tasks(file: EvidenceFile, heads: Sequence[str]) -> Markup:
    """The tasks, their differences as a picture and in words; nothing where there are none."""
    found = proofs.tasks(file)
    if not found:
        return Markup("")
    rows = [[t.name, t.unit, t.dense, t.thinned, t.change, t.inside, t.p, t.sees, t.n] for t in found]
    said = Markup("").join(Markup("<p>{}</p>").format(line) for line in file.notes)
    table = _table(["task", "unit", *heads, "p", "sees", "n"], rows)
    return table + (proofs.task_chart(file) or Markup("")) + said


def _piece(*parts: Markup) -> str:
    inside = Markup("").join(parts)
    return str(Markup('<div class="lamina-piece">{}{}</div>').format(STYLE, inside))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    def cells(row: Sequence[str], tag: str) -> Markup:
        made = (
            Markup("<{}{}>{}</{}>").format(Markup(tag), Markup(' class="n"' if _numeric(c) else ""), c, Markup(tag))
            for c in row
        )
        return Markup("<tr>{}</tr>").format(Markup("").join(made))

    body = Markup("").join(cells(row, "td") for row in rows)
    return Markup("<table><thead>{}</thead><tbody>{}</tbody></table>").format(cells(heads, "th"), body)


def _numeric(cell: str) -> bool:
    return bool(cell) and (cell == NONE or cell[0] in "0123456789+×−" or cell[0] == "-")


def _clip(words: str, most: int = 80) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"


def _load(kind: type[D], folder: Path | str, name: str, verb: str) -> D:
    path = Path(folder) / name
    if not path.is_file():
        raise InputError(f"{name} is missing", where=folder, hint=f"run lamina {verb} first")
    return kind.load(path)
