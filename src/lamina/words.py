"""The words of the command line that several verbs share: their names, metavars and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, as `thin` or `survey` makes it.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a hub id, a .gguf file or a name of the shelf.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="The run folder to make or go on with.")]
Keep = Annotated[str | None, typer.Option(metavar="SHARE", help="Share of the parameters to keep: 75% or 0.75.")]
Parameters = Annotated[str | None, typer.Option(metavar="N", help="Parameters to keep at most: 100M or 50%.")]
Bytes = Annotated[
    str | None, typer.Option("--bytes", metavar="SIZE", help="Bytes of weights to keep at most: 200MB or 50%.")
]
KV = Annotated[
    str | None, typer.Option("--kv", metavar="SIZE@TOKENS", help="KV bytes to keep at most: 0.5x@32k or 100MB@32k.")
]
Latency = Annotated[
    str | None, typer.Option(metavar="TIME@WORK", help="Time to keep at most, measured here: 0.7x@decode, 20ms@decode.")
]
Blocks = Annotated[int | None, typer.Option(metavar="N", help="Blocks to drop.")]
Sublayers = Annotated[int | None, typer.Option(metavar="N", help="Sublayers (attentions, MLPs) to drop.")]
Protect = Annotated[list[str] | None, typer.Option(metavar="SITE", help="A site that must stay; may be repeated.")]
Frontier = Annotated[
    bool, typer.Option("--frontier", help="Also the cheapest plans for ever smaller budgets: a table and frontier.svg.")
]
Explain = Annotated[
    bool, typer.Option("--explain", help="Also say for each step why, at what price, and what came second.")
]
Named = Annotated[
    str, typer.Option("--recipe", "-r", metavar="NAME|FILE", help="A recipe of `lamina methods`, or a file.")
]
Refit = Annotated[bool | None, typer.Option("--refit/--no-refit", help="Refit, in closed form, the maps that stay.")]
Steps = Annotated[int | None, typer.Option("--heal", metavar="STEPS", help="Heal for so many steps.")]
Minutes = Annotated[float | None, typer.Option("--heal-minutes", metavar="MIN", help="Heal for so many minutes.")]
Text = Annotated[str, typer.Option(metavar="SOURCE", help="Calibration text: file, folder, JSONL, Parquet, hf:NAME.")]
Heldout = Annotated[str, typer.Option(metavar="SOURCE", help="Held-out text to prove on.")]
Column = Annotated[str, typer.Option(metavar="NAME", help="The text column of JSONL, Parquet and data sets.")]
Sequences = Annotated[int, typer.Option(metavar="N", help="Calibration sequences.")]
HeldoutSequences = Annotated[int, typer.Option(metavar="N", help="Held-out sequences.")]
Length = Annotated[int, typer.Option(metavar="TOKENS", help="Tokens of a sequence.")]
Dtype = Annotated[str, typer.Option(metavar="TYPE", help="auto, float32 or bfloat16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, …")]
Seed = Annotated[int, typer.Option(help="Seed of all random choices.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Gguf = Annotated[bool, typer.Option("--gguf", help="Also write model.gguf for llama.cpp.")]
Measures = Annotated[
    str | None, typer.Option("--measures", metavar="A,B", help="Measures of `lamina methods`; `all` for all.")
]
Shards = Annotated[
    int | None, typer.Option(metavar="N", help="Parts of the text; a survey that was cut off goes on behind them.")
]
RayAt = Annotated[
    str | None,
    typer.Option("--ray", metavar="ADDRESS", help="Work on shards with Ray: auto, or an address."),
]
Stream = Annotated[
    bool, typer.Option("--stream", help="Read the model block by block from disk, for one larger than memory.")
]
Scratch = Annotated[
    Path | None, typer.Option(metavar="DIR", help="With --stream: keep the states of the text in a file there.")
]
Compare = Annotated[
    bool, typer.Option("--compare", help="Print how measures agree, and how stable each is over texts and seeds.")
]
Libraries = Annotated[
    list[str] | None, typer.Option("--library", metavar="NAME", help="transformers, timm, diffusers; may be repeated.")
]
Types = Annotated[list[str] | None, typer.Option("--only", metavar="TYPE", help="Of --coverage; may be repeated.")]
Part = Annotated[str | None, typer.Option("--shard", metavar="I/N", help="The I-th of N parts of --coverage, as JSON.")]
Page = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="FILE", help="Where --coverage writes: a page, or a part (.json).")
]
