"""List the tasks that models are asked to do."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamina.core.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from lamina.evaluators.tasks._item import Task


def tasks(
    of: Annotated[
        str | None, typer.Option(metavar="KIND", help="Those of one kind of model: decoder, vision, …")
    ] = None,
) -> None:
    """List all tasks of `prove --tasks`: what each shows, of which models, its items, package and licence."""
    from rich.table import Table

    from lamina.evaluators.tasks import _item
    from lamina.terminal import console

    known = _item.tasks().values()
    kinds = {kind for task in known for kind in task.of}
    if of is not None and of not in kinds:
        raise InputError(f"no task is of {of!r}", where="--of", hint=did_you_mean(of, kinds))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("name", "capability", "of", "items", "package", "licence", "what"):
        table.add_column(column, justify="right" if column == "items" else "left", no_wrap=column != "what")
    sources = _sources()
    for task in known:
        if of is None or of in task.of:
            items = f"{task.items:,}" if task.items else "any"
            own = (task.name, task.capability, ", ".join(task.of), items, *origin(task, sources), task.summary)
            table.add_row(*own)
    console.print(table)
    for prefix in _item.families():
        typer.echo(f"{prefix}:NAME: a task of {prefix}")


def _sources() -> dict[str, Any]:
    """The data sets by name, read without the lab, which would bring torch."""
    import yaml

    text = resources.files("lamina").joinpath("lab", "datasets.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def origin(task: Task, sources: dict[str, Any]) -> tuple[str, str]:
    """The package that a task's data comes with, and its licence in short."""
    if not task.data:
        return task.package, task.licence
    entry = sources[task.data]
    return str(entry["package"]), str(entry["licence"]).partition(" (")[0]
