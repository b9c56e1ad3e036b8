from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def literal() -> ModuleType:
    """The formulas written out."""
    import papers_literal

    return papers_literal


@pytest.fixture(scope="session")
def rows() -> SimpleNamespace:
    """`rows.plan(name, lab, budget)`: what a recipe row chooses, as the pipeline puts it together."""
    from lamina.core.registry import MEASURES, PLANNERS, row
    from lamina.lab import Bench

    def plan(name, lab, budget, **options):
        entry = row(name)
        measure = MEASURES.make(entry.measure, entry.measure_options) if entry.measure else None
        scores = measure.measure(lab) if measure else None
        kinds = {"kinds": entry.kinds} if entry.kinds else {}
        planner = PLANNERS.make(entry.planner, {**entry.planner_options, **kinds, **options})
        return planner.plan(scores, budget, lab.anatomy, Bench(lab, measure))

    return SimpleNamespace(plan=plan)
