"""The public test kit: tiny models, planted truth, and the checks that every method of a role must pass.

A plug-in's tests need one line per method: `lamina.testing.check_measure(MyMeasure)`.
"""

from lamina.testing.measures import check_measure
from lamina.testing.models import BUILDERS, NAMES, tiny
from lamina.testing.planners import check_planner
from lamina.testing.rewrites import check_rewrite
from lamina.testing.suite import checks_for, known_failures
from lamina.testing.tools import check_evaluator, check_exporter, check_healer

__all__ = [
    "BUILDERS",
    "NAMES",
    "check_evaluator",
    "check_exporter",
    "check_healer",
    "check_measure",
    "check_planner",
    "check_rewrite",
    "checks_for",
    "known_failures",
    "tiny",
]
