"""Time both models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

import lamina.words as w
from lamina.commands.screen import shown
from lamina.core.errors import InputError
from lamina.options import opened

if TYPE_CHECKING:
    from rich.table import Table

    from lamina.core.speeds import Held, Part, SpeedFile, SpeedRow, Spread

KINDS = {"prefill": "tokens/s of prefill", "decode": "tokens/s of decoding", "energy": "joules per token"}


def speed(
    folder: w.Folder,
    batch: Annotated[str, typer.Option(metavar="N,N", help="Prompts that are answered together.")] = "1,4",
    length: Annotated[
        str | None, typer.Option(metavar="N,N", help="Tokens of a prompt: 128,512 as far as the context holds them.")
    ] = None,
    decode: Annotated[int, typer.Option(metavar="N", help="Tokens made behind each prompt.")] = 32,
    engine: Annotated[
        str | None, typer.Option(metavar="A,B", help="transformers, llamacpp; both where both can run the models.")
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", help="Rounds of dense, thinned, thinned, dense.")] = 5,
    threads: Annotated[int | None, typer.Option(metavar="N", help="Threads of both engines; torch's number.")] = None,
) -> None:
    """Time the dense and the thinned model in turn: prefill, decoding, sublayers, memory and energy."""
    from lamina.pipeline.timing import FILE, HowFast
    from lamina.pipeline.timing import speed as measure

    how = HowFast(
        batches=numbers(batch, "--batch"), lengths=None if length is None else numbers(length, "--length"),
        decode=decode, engines=None if engine is None else tuple(engine.split(",")), rounds=rounds, threads=threads,
    )  # fmt: skip
    run = opened(folder)
    with shown(run):
        found = measure(run, how)
    show(found)
    typer.echo(str(run.path(FILE)))


def numbers(text: str, option: str) -> tuple[int, ...]:
    """`1,4` as whole numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{text!r} are no whole numbers", where=option, hint=f"write {option} 1,4") from None


def show(found: SpeedFile) -> None:
    """Print all tables; what shows no gain is in bold."""
    from lamina.terminal import console

    facts = found.machine
    console.print(
        f"{facts.get('processor', '')}, {facts.get('cores')} cores, {facts.get('threads')} threads, "
        f"{facts.get('dtype')} on {facts.get('device')}",
        markup=False,
    )
    for engine in dict.fromkeys(row.engine for row in found.rows):
        for what, words in KINDS.items():
            rows = [r for r in found.rows if (r.engine, r.what) == (engine, what)]
            if rows:
                console.print(_speeds(f"{engine}: {words}", rows))
    if found.parts:
        console.print(_parts(found.parts, f"what sublayers take, {found.batch}×{found.length} tokens"))
    if found.held:
        console.print(_held(found.held))
    for note in found.notes:
        console.print(note, markup=False)


def _grid(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right", no_wrap=True)
    return table


def _speeds(title: str, rows: Sequence[SpeedRow]) -> Table:
    change = "thinned / dense [95 %]" if rows[0].what == "energy" else "speed-up [95 %]"
    table = _grid(title, "prompt", "dense", "thinned", change, "")
    table.columns[-1].justify, table.columns[-1].no_wrap = "left", False
    for row in rows:
        said = f"[bold]no gain: {row.verdict}[/bold]" if row.verdict else ""
        ratio = "×" + _spread(row.ratio)
        table.add_row(
            f"{row.batch}×{row.length}", _spread(row.dense), _spread(row.thinned),
            f"[bold]{ratio}[/bold]" if row.verdict else ratio, said,
        )  # fmt: skip
    return table


def _spread(spread: Spread) -> str:
    from lamina.terminal import number

    if spread.low is None or spread.high is None:
        return number(spread.value)
    return f"{number(spread.value)} \\[{number(spread.low)}–{number(spread.high)}]"


def _parts(parts: Sequence[Part], title: str) -> Table:
    from lamina.terminal import number

    table = _grid(title, "one", "of", "how many", "parameters", "prefill ms", "all", "decode ms", "all")

    def cells(part: Part) -> Iterator[str]:
        for seconds, share in ((part.prefill, part.prefill_share), (part.decode, part.decode_share)):
            yield "" if seconds is None else f"{1000 * seconds:.3g}"
            yield "" if share is None else f"{share:.1%}"

    for part in parts:
        name = f"{part.kind} like {part.like}" if part.count > 1 else f"{part.kind} {part.like}".strip()
        size = number(part.parameters) if part.parameters else ""
        table.add_row(name, part.of, str(part.count), size, *cells(part))
    return table


def _held(held: Sequence[Held]) -> Table:
    from lamina.terminal import number

    kinds = ("weights", "kv", "activations", "process", "libraries")
    first = held[0]
    heads = ("weights", "cache", "activations", "process at its peak", "of it libraries")
    table = _grid(f"memory, {first.batch}×{first.length} tokens", "engine", "of", *heads)
    for row in held:
        values = [getattr(row, kind) for kind in kinds]
        table.add_row(row.engine, row.of, *("" if v is None else number(v, "B") for v in values))
    return table
