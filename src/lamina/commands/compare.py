"""Two models on the same tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import lamina.words as w


def compare(
    dense: Annotated[str, typer.Argument(metavar="DENSE", help="A folder, a hub id, a .gguf file or a name.")],
    thinned: Annotated[str, typer.Argument(metavar="THINNED", help="The same, of a model made from it.")],
    tasks: Annotated[
        str, typer.Option(metavar="A,B", help="Tasks of `lamina tasks`; `offline`: all that fit the models.")
    ] = "offline",
    items: Annotated[int, typer.Option(metavar="N", help="Items of each task at most.")] = 500,
    seed: Annotated[int, typer.Option(metavar="N", help="Which items are drawn.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Keep marks and evidence.json there.")
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="TYPE", help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, …")] = "cpu",
    trust_remote_code: w.Trust = False,
) -> None:
    """Ask two models of any kind the same tasks, whoever made them: no run is needed."""
    from lamina.commands.outcomes import print_outcomes
    from lamina.lab.load import load
    from lamina.pipeline.comparing import Comparison
    from lamina.terminal import console, progress

    given = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code, "any_kind": True}
    asked = Comparison(load(dense, **given), load(thinned, **given), items=items, seed=seed, folder=out)
    with progress(asked):
        found = asked.measure(tasks)
    print_outcomes(found)
    for line in found.notes:
        console.print(line, markup=False)
    if out is not None:
        typer.echo(str(out / "evidence.json"))
