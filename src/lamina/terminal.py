"""What the command line shows: progress, tables, trees."""

from __future__ import annotations

import importlib
import os
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lamina.core import registry
from lamina.core.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from lamina.anatomy import Anatomy, Stack
    from lamina.core.documents import Evidence, EvidenceFile
    from lamina.core.menu import Frontier, Reason
    from lamina.pipeline import Run
    from lamina.pipeline.comparing import Comparison
    from lamina.report.listing import Listing
    from lamina.report.survey import Survey

console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)


@contextmanager
def progress(run: Run | Comparison) -> Iterator[None]:
    """Show its progress: bars on a terminal, a line that changes in a notebook, now and then a line elsewhere."""
    run.say = lambda line: console.print(line, style="dim", markup=False)
    if console.is_jupyter:
        with _cell(run):
            yield
        return
    if not console.is_terminal:
        run.progress = _Lines().show
        yield
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            name = what.partition(":")[0]
            if name not in tasks:
                tasks[name] = bars.add_task(what, total=total)
            bars.update(tasks[name], completed=done, total=total, description=what)
            if done >= total:
                bars.remove_task(tasks.pop(name))

        run.progress = show
        yield


class _Lines:
    """Progress where there is no terminal: of work that takes longer, a line every five seconds for each kind."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self._told: set[str] = set()

    def show(self, what: str, done: int, total: int) -> None:
        """Print a line if it is time for one, and where work ends of which lines were printed."""
        now, name = time.monotonic(), what.partition(":")[0]
        if now - self._last.setdefault(name, now) >= 5 or (done >= total and name in self._told):
            self._last[name] = now
            self._told.add(name)
            console.print(f"{what} {done}/{total}", markup=False)
        if done >= total:
            self._last.pop(name)
            self._told.discard(name)


@contextmanager
def _cell(run: Run | Comparison) -> Iterator[None]:
    """Progress below a notebook's cell: lines of what is done, and one of how far it is, empty in the end."""
    shown: Any = importlib.import_module("IPython.display").display
    line, last = shown({"text/plain": ""}, raw=True, display_id=True), 0.0

    def show(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 0.2:
            last = time.monotonic()
            line.update({"text/plain": f"{what} {done}/{total}"}, raw=True)

    run.progress, run.say = show, lambda text: shown({"text/plain": text}, raw=True)
    try:
        yield
    finally:
        line.update({"text/plain": ""}, raw=True)


def _grid(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right", no_wrap=place != 1)
    return table


def number(value: float, unit: str = "") -> str:
    """Three significant digits or four, with k, M, G where it is long."""
    if unit in ("B", "bytes"):
        for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
            if abs(value) >= size:
                return f"{value / size:.4g} {name}"
        return f"{value:.0f} B"
    for size, name in ((1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.4g} {name}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def interval(evidence: Evidence | None) -> str:
    """A value with its 95 % interval."""
    if evidence is None:
        return ""
    sign = "×" if evidence.of == "ratio" else "+" if evidence.of == "difference" and evidence.value >= 0 else ""
    text = sign + number(evidence.value, evidence.unit)
    if evidence.low is None or evidence.high is None:
        return text
    return f"{text} [{number(evidence.low, evidence.unit)}–{number(evidence.high, evidence.unit)}]"


ROWS = (
    ("perplexity", "perplexity", "ratio"),
    ("loss", "loss, nats/token", "difference"),
    ("kl", "KL from dense, nats/token", ""),
    ("parameters", "parameters", "ratio"),
    ("bytes", "bytes of weights", "ratio"),
    ("kv_bytes", "KV bytes per token", "ratio"),
    ("prefill", "prefill, tokens/s", "ratio"),
    ("decode", "decode, tokens/s", "ratio"),
    ("peak_memory", "peak memory", "ratio"),
)


def print_evidence(run: Run) -> None:
    """Dense, thinned and what changed, with intervals; predicted against measured; no gain said in bold."""
    found: EvidenceFile = run.evidence()
    table = _grid("", "", "dense", "thinned", "change [95 %]")
    for name, words, change in ROWS:
        dense, thinned = found.get(name, "dense"), found.get(name)
        if thinned is not None:
            table.add_row(
                words, interval(dense), interval(thinned), interval(found.get(name, change)) if change else ""
            )
    console.print(table)
    expected, measured = found.get("expected_loss", "difference"), found.get("loss", "difference")
    if expected is not None and measured is not None:
        console.print(f"expected loss {expected.value:+.3f} nats/token, measured {measured.value:+.3f}")
    for name in ("prefill", "decode"):
        ratio = found.get(name, "ratio")
        if ratio is not None and ratio.low is not None and ratio.low <= 1:
            console.print(f"[bold]no gain[/bold] of {name} is shown: {interval(ratio)}")
    from lamina.commands.outcomes import print_outcomes

    print_outcomes(found)
    for line in found.notes:
        console.print(line, markup=False)


def print_survey(run: Run) -> None:
    """The lowest sites by every measure, with standard errors and the intervals of their ranks."""
    from lamina.report.listing import lowest
    from lamina.report.survey import Survey

    for listing in lowest(Survey.open(run.folder)):
        _print_listing(listing)
    console.print(str(run.path("survey.parquet")), markup=False)


def print_compare(run: Run | Survey) -> None:
    """How alike the measures rank the sites, and how stable each one's ranks are over texts and seeds."""
    from lamina.report.listing import agreement, stability
    from lamina.report.survey import Survey

    survey = run if isinstance(run, Survey) else Survey.open(run.folder)
    for listing in (*agreement(survey), *stability(survey)):
        _print_listing(listing)


def _print_listing(listing: Listing) -> None:
    if listing.heads:
        table = _grid(escape(listing.title), *(escape(head) for head in listing.heads))
        for n, column in enumerate(table.columns):
            words = any(row[n][:1].isalpha() for row in listing.rows)
            column.justify = "left" if words or n == 0 else "right"
        for row in listing.rows:
            table.add_row(*(escape(cell) for cell in row))
        console.print(table)
    for note in listing.notes:
        for line in textwrap.wrap(note, 118, subsequent_indent="    "):
            console.print(line, markup=False)
    console.print()


def print_plan(run: Run) -> None:
    """The steps with their reasons, and what the plan expects."""
    plan = run.plan()
    table = _grid("", "step", "sites", "why")
    for step in plan.steps:
        why = ", ".join(f"{k} {number(v)}" for k, v in step.why.items())
        table.add_row(step.rewrite, _short(step.sites), why)
    console.print(table)
    console.print("expects " + ", ".join(f"{k} {number(v)}" for k, v in plan.expects.items()))
    console.print(f"{run.path('plan.yaml')}: edit it if you like, then lamina apply {run.folder}")


def _short(sites: Sequence[str]) -> str:
    """Sites in a row; those inside one place behind its name: `block.0.mlp: up_proj down_proj`."""
    inside: dict[str, list[str]] = {}
    for site in sites:
        place, _, name = site.rpartition(".")
        inside.setdefault(place, []).append(name)
    return "  ".join(
        f"{place}: {' '.join(names)}" if place.count(".") > 1 else " ".join(f"{place}.{n}".lstrip(".") for n in names)
        for place, names in inside.items()
    )


def print_frontier(run: Run, found: Frontier) -> None:
    """The cheapest plans for ever smaller budgets as a table, and as `frontier.svg` in the run folder."""
    from lamina.core.files import write_text
    from lamina.report.frontier import frontier_listing, frontier_picture

    plan = run.plan()
    freed = sum(s.why.get(found.resource, 0.0) for s in plan.steps)
    here = (freed, plan.expects["loss"]) if plan.steps and "loss" in plan.expects else None
    _print_listing(frontier_listing(found))
    write_text(run.path("frontier.svg"), str(frontier_picture(found, here)))
    console.print(str(run.path("frontier.svg")), markup=False)


def print_reasons(reasons: Sequence[Reason]) -> None:
    """Why each step of a plan was taken, and what came second."""
    from lamina.report.frontier import reasons_listing

    if reasons:
        resources = [k for k in reasons[0].option.saves if any(r.option.saves.get(k) for r in reasons)]
        _print_listing(reasons_listing(reasons, resources))


def print_anatomy(model: str, certify: bool, trust_remote_code: bool) -> None:
    """The tree of a model's blocks and sublayers with their costs."""
    from lamina.anatomy import Anatomy
    from lamina.lab.load import load

    anatomy = Anatomy.of(load(model, trust_remote_code=trust_remote_code).model)
    certificate = anatomy.certify()
    console.print(model, markup=False)
    for stack in anatomy.stacks:
        console.print(_stack_table(anatomy, stack, certificate.errors if certify else None))
    total = anatomy.total()
    console.print(
        f"{number(total.parameters)} parameters, {number(total.bytes, 'bytes')}, {number(total.macs)} MACs/token, "
        f"{number(total.kv_bytes, 'bytes')} of KV per token"
    )
    console.print(
        f"certified: input + branches = output in every block, to {certificate.worst:.1e} of its norm "
        f"({certificate.dtype}, at most {certificate.tolerance:.0e})"
    )


def _stack_table(anatomy: Anatomy, stack: Stack, errors: Mapping[str, float] | None) -> Table:
    """One stack's blocks, each with its sublayers below it; their modules are named from the block on."""
    columns = ("module", "parameters", "share", "MACs/token", "KV B/token", *(["residual error"] if errors else []))
    title = f"{stack.name or 'stack'} {stack.path}: {len(stack.blocks)} blocks of width {stack.width}"
    table = _grid(title, "site", *columns)
    table.columns[1].justify = "left"
    whole = max(anatomy.total().parameters, 1)
    for block in stack.blocks:
        last = block.branches[-1] if block.branches else None
        rows = [("", block.site, block.path)]
        rows += [("└ " if b is last else "├ ", b.site, f"  {b.core}") for b in block.branches]
        for guide, site, module in rows:
            cost = anatomy.cost(site)
            costs = (number(cost.parameters), f"{cost.parameters / whole:.1%}", number(cost.macs))
            error = [f"{errors[site.id]:.1e}" if site.id in errors else ""] if errors else []
            table.add_row(guide + site.id, module, *costs, str(cost.kv_bytes or ""), *error)
    return table


def print_coverage(
    parts: Sequence[str], libraries: Sequence[str], only: Sequence[str], shard: str | None, out: Path | None
) -> None:
    """Examine what is asked for, or put parts together; write the page or a part, and print how much holds."""
    from lamina.testing import coverage

    if not parts:
        wanted = coverage.names(libraries or coverage.LIBRARIES, only, shard or "1/1")
        shown = _Lines()
        told = lambda _, done, total: shown.show("examining", done, total)  # noqa: E731
        rows = coverage.run(wanted, progress=told, jobs=os.cpu_count() or 1)
        versions = coverage.versions(rows)
    elif libraries or only or shard:
        raise InputError("parts are put together as they are", hint="without --library, --only and --shard")
    else:
        rows, versions = coverage.read([Path(p) for p in parts])
    if out is None:
        out = Path(f"coverage-{shard.replace('/', '-of-')}.json" if shard else "coverage.md")
    coverage.write(rows, out, versions)
    head, *lines = coverage.summary(rows)
    table = _grid("", *head)
    for line in lines:
        table.add_row(*line)
    console.print(table)
    console.print(str(out), markup=False)


def print_methods(role: str | None) -> None:
    """All methods of one role, or of all."""
    roles: Sequence[str] = ["recipe", *registry.ROLES]
    if role is not None and role not in roles:
        raise InputError(f"no role named {role!r}", hint=did_you_mean(role, roles))
    for name in [role] if role else roles:
        table = _grid(f"[bold]{name}[/bold]", "name", "what", "status", "paper")
        for column in table.columns:
            column.justify = "left"
        if name == "recipe":
            for key, row in registry.rows().items():
                table.add_row(key, row.summary, str(row.status), row.paper.key if row.paper else "lamina")
        else:
            for key in registry.ROLES[name]:
                card = registry.ROLES[name].card(key)
                table.add_row(key, card.summary, str(card.status), card.paper.key if card.paper else "lamina")
        console.print(table)
        console.print()


def print_method(name: str) -> None:
    """All that is known of one method or recipe."""
    shown = False
    if name in registry.rows():
        row, shown = registry.row(name), True
        console.print(f"[bold]{name}[/bold] (recipe, {row.status}): {row.summary}")
        parts = {"measure": row.measure or "none", "planner": row.planner, "rewrite": row.rewrite, "refit": row.refit}
        _print_fields({**parts, **{f"planner.{k}": v for k, v in row.planner_options.items()}})
        _print_origin(row.paper, row.deviations)
    for role, entries in registry.ROLES.items():
        if name in entries:
            card, shown = entries.card(name), True
            console.print(f"[bold]{name}[/bold] ({role}, {card.status}): {card.summary}")
            _print_fields({o: f"{t} = {d}" for o, t, d in card.options})
            _print_origin(card.paper, card.deviations)
    if not shown:
        known = [*registry.rows(), *(n for r in registry.ROLES.values() for n in r)]
        raise InputError(f"no method named {name!r}", hint=did_you_mean(name, known))


def _print_fields(fields: dict[str, Any]) -> None:
    for key, value in fields.items():
        console.print(f"  {key}: {value}", markup=False)


def _print_origin(paper: Any, deviations: Sequence[str]) -> None:
    for deviation in deviations:
        console.print(f"  deviates: {deviation}", markup=False)
    if paper is not None:
        console.print(f"  {', '.join(paper.authors)} ({paper.year}). {paper.title}. {paper.link}", markup=False)
