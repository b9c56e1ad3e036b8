"""Verbs of the command line that have a file of their own; `lamina.cli` names them."""

from lamina.commands.apply import apply
from lamina.commands.compare import compare
from lamina.commands.export import export
from lamina.commands.prove import prove
from lamina.commands.report import report
from lamina.commands.speed import speed
from lamina.commands.tasks import tasks
from lamina.commands.watch import watch

__all__ = ["apply", "compare", "export", "prove", "report", "speed", "tasks", "watch"]
