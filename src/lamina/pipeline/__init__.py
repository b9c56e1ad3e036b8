"""The verbs, as functions over a run folder."""

from lamina.pipeline.choosing import explain, frontier, price
from lamina.pipeline.run import Run
from lamina.pipeline.verbs import apply, export, heal, plan, prove, survey, thin

__all__ = ["Run", "apply", "explain", "export", "frontier", "heal", "plan", "price", "prove", "survey", "thin"]
