"""`export --check`: the ladder of a run, with the nearest plan for each target that does not load it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.core.errors import InputError
from lamina.core.files import fingerprint
from lamina.exporters.ladder import FILE, FORMATS, TARGETS, Ladder, Rung, ladder
from lamina.pipeline.exporting import noted
from lamina.pipeline.nearest import Nearest, nearest

if TYPE_CHECKING:
    from lamina.core.documents import Plan, Receipts
    from lamina.pipeline.run import Run

NONE = "none: it does not load the dense model either"


def climb(run: Run) -> tuple[Rung, ...]:
    """The rungs of what the run has made; also written to `ladder.json`."""
    receipts = run.receipts()
    known = noted(run, receipts)
    ran = {r.target: r.ran for r in known.rungs} if known else {}
    found = ladder(receipts.receipts, run.thinned, run.loaded, {**ran, **_reloaded(run, receipts)})
    plan = _plan(run, receipts)
    rungs = tuple(r if r.ok else dataclasses.replace(r, nearest=_told(run, receipts, plan, r.target)) for r in found)
    Ladder(receipts=fingerprint(receipts.to_data()), rungs=rungs).save(run.path(FILE))
    return rungs


def write_nearest(run: Run, to: Path, kind: str | None = None) -> Nearest:
    """Write the nearest plan that all targets load (of an exporter: all that it writes for), and give it.

    Targets that don't load the dense model are left out. Raises InputError where the plan needs no change, or was
    changed after it was applied.
    """
    receipts = run.receipts()
    plan = _plan(run, receipts)
    if plan is None:
        raise InputError("the plan was changed after it was applied", where=run.folder, hint="run lamina apply first")
    asked = [t for t in TARGETS if kind in (None, FORMATS[t]) and _takes_dense(run, t)]
    found = nearest(plan, asked, run.anatomy, receipts.receipts)
    if found is None:
        raise InputError("this plan is loaded as it is, or no plan would be", where=run.path("plan.yaml"))
    found.plan.save(to)
    return found


def _plan(run: Run, receipts: Receipts) -> Plan | None:
    """The plan that was applied, if it is still there."""
    path = run.path("plan.yaml")
    return run.plan() if path.is_file() and receipts.plan == fingerprint(path) else None


def _told(run: Run, receipts: Receipts, plan: Plan | None, target: str) -> str:
    if not _takes_dense(run, target):
        return NONE
    if plan is None:
        return ""
    found = nearest(plan, [target], run.anatomy, receipts.receipts)
    return found.line if found is not None else ""


def _takes_dense(run: Run, target: str) -> bool:
    """Whether the target loads the dense model, so that some plan would do."""
    from lamina.exporters.deci import Deci
    from lamina.exporters.gguf import Gguf

    dense: Any = run.loaded.model
    problems: Sequence[Any] = ()
    if FORMATS[target] == "deci":
        problems = Deci(engine=target).check((), dense)
    elif FORMATS[target] == "gguf":
        problems = Gguf().check((), dense, run.loaded)
    return not problems


def _reloaded(run: Run, receipts: Receipts) -> dict[str, bool]:
    """Whether transformers has run what is published: the reload contract was kept on these very files."""
    from lamina.exporters.hf import form

    kept = (run.folder / ".state" / "contract.json").is_file()
    return {"transformers" if form(run.thinned, receipts.receipts) == "stock" else "shim": kept}
