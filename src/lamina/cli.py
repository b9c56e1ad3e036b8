"""The command line: thin verbs over run folders. No method is named here."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

import lamina.words as w
from lamina import commands
from lamina.__main__ import INTERRUPTED, interrupted
from lamina.commands.screen import say, shown
from lamina.core.errors import InputError, LaminaError
from lamina.options import begin, budget_of, laid_over, make_recipe, opened, recipe_of

if TYPE_CHECKING:
    from lamina.pipeline import Run

app = typer.Typer(
    name="lamina",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find the layers that a pretrained network does not need, take them out, and prove what that cost.",
    epilog="Start with: [bold]lamina thin smollm2-135m --keep 75%[/bold]",
)

RAY_SHARDS = 8
"""Of a survey on Ray, where the user names no number."""


@app.command(epilog="Example: lamina thin smollm2-135m --keep 75% --out run")
def thin(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="A folder, a hub id, a .gguf file or a name.")] = "",
    keep: w.Keep = None,
    parameters: w.Parameters = None,
    bytes_: w.Bytes = None,
    kv: w.KV = None,
    latency: w.Latency = None,
    blocks: w.Blocks = None,
    sublayers: w.Sublayers = None,
    protect: w.Protect = None,
    recipe: w.Named = "default",
    out: w.Out = None,
    refit: w.Refit = None,
    heal: w.Steps = None,
    heal_minutes: w.Minutes = None,
    text: w.Text = "default",
    heldout: w.Heldout = "default",
    column: w.Column = "text",
    sequences: w.Sequences = 32,
    heldout_sequences: w.HeldoutSequences = 32,
    length: w.Length = 512,
    dtype: w.Dtype = "auto",
    device: w.Device = "cpu",
    seed: w.Seed = 0,
    trust_remote_code: w.Trust = False,
    gguf: w.Gguf = False,
) -> None:
    """Survey, plan, apply, heal, prove, export and report, in one go. Run again, it goes on where it was."""
    name, data = recipe_of(recipe)
    model = model or data.get("model", "")
    if not model:
        raise InputError("which model?", hint="lamina thin MODEL --keep 75%")
    budget = budget_of(context.params)
    if budget is None and "budget" not in data:
        raise InputError(
            "how much may stay?", hint="--keep 75%, --parameters 100M, --bytes 200MB, --blocks 8, --sublayers 15"
        )
    asked: dict[str, Any] = {
        "refit": refit, "dtype": dtype, "device": device, "seed": seed, "gguf": gguf,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    texts: dict[str, Any] = {
        "text": text, "heldout": heldout, "column": column, "length": length, "sequences": sequences,
        "heldout_sequences": heldout_sequences,
    }  # fmt: skip
    chosen = laid_over(data, asked, texts, lambda name: str(context.get_parameter_source(name)).endswith("COMMANDLINE"))
    if heal is not None or heal_minutes is not None:
        chosen = {**chosen, "heal": {"steps": heal, "minutes": heal_minutes}}
    if budget is not None:
        chosen = {**chosen, "budget": budget.to_data()}
    run = begin(make_recipe({**chosen, "name": name, "model": model}), out)
    from lamina import pipeline
    from lamina.report import write

    with shown(run):
        pipeline.thin(run)
    write(run.folder)
    finish(run)


@app.command(epilog="Example: lamina survey smollm2-135m --out run --measures cosine,damage --compare")
def survey(
    model: w.Model,
    out: w.Out = None,
    measures: w.Measures = None,
    text: w.Text = "default",
    column: w.Column = "text",
    sequences: w.Sequences = 32,
    length: w.Length = 512,
    dtype: w.Dtype = "auto",
    device: w.Device = "cpu",
    seed: w.Seed = 0,
    shards: w.Shards = None,
    ray: w.RayAt = None,
    stream: w.Stream = False,
    scratch: w.Scratch = None,
    compare: w.Compare = False,
    trust_remote_code: w.Trust = False,
) -> None:
    """Score every block and sublayer of a model of any kind; `lamina plan` goes on from there."""
    from lamina import pipeline
    from lamina.core import registry
    from lamina.pipeline.scoring import COMPARED, How

    names = None if measures is None else list(registry.MEASURES) if measures == "all" else measures.split(",")
    for name in names or []:
        registry.MEASURES.card(name)
    if scratch is not None and not stream:
        raise InputError(
            "the states of a model in memory need no file", where="--scratch", hint="it belongs to --stream"
        )
    parts = shards if shards is not None else COMPARED if compare else RAY_SHARDS if ray else 1
    how = How(shards=parts, ray=ray, scratch=scratch, compare=compare)
    data: dict[str, Any] = {"calibration": text, "column": column, "sequences": sequences, "length": length}
    if text.endswith(".safetensors"):  # there may be no tokenizer, which lamina's own held-out prose would need
        data |= {"heldout": text, "heldout_sequences": 1}
    asked = {"model": model, "budget": {"keep": 1.0}, "data": data, "dtype": dtype, "device": device, "seed": seed}
    run = begin(make_recipe({**asked, "trust_remote_code": trust_remote_code}), out)
    run.any_kind, run.streamed = True, stream
    with shown(run):
        pipeline.survey(run, names, how)
    from lamina.terminal import print_compare, print_survey

    print_survey(run)
    if compare:
        print_compare(run)


@app.command(epilog="Example: lamina plan run --keep 75% --recipe shortgpt")
def plan(
    context: typer.Context,
    folder: w.Folder,
    keep: w.Keep = None,
    parameters: w.Parameters = None,
    bytes_: w.Bytes = None,
    kv: w.KV = None,
    latency: w.Latency = None,
    blocks: w.Blocks = None,
    sublayers: w.Sublayers = None,
    protect: w.Protect = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", metavar="NAME", help="A recipe of `lamina methods`.")
    ] = None,
    refit: w.Refit = None,
    frontier: w.Frontier = False,
    explain: w.Explain = False,
) -> None:
    """Choose what goes, within budgets. The plan is a file: read it, edit it, then `lamina apply`."""
    from lamina import pipeline
    from lamina.core import registry

    run = opened(folder)
    budget = budget_of(context.params)
    changes: dict[str, Any] = {"budget": budget} if budget is not None else {}
    if recipe is not None:
        changes["name"] = registry.row(recipe).name
    if refit is not None:
        changes["refit"] = refit
    run.change(**changes)
    with shown(run):
        pipeline.survey(run)
        pipeline.plan(run)
        found = pipeline.frontier(run) if frontier else None
        reasons = pipeline.explain(run) if explain else ()
    from lamina.terminal import print_frontier, print_plan, print_reasons

    print_plan(run)
    print_reasons(reasons)
    if found is not None:
        print_frontier(run, found)


app.command(epilog="Example: lamina apply run")(commands.apply)


@app.command(epilog="Example: lamina heal run --steps 200")
def heal(
    folder: w.Folder,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Training steps.")] = None,
    minutes: Annotated[float | None, typer.Option(metavar="MIN", help="Minutes of training.")] = None,
    healer: Annotated[str, typer.Option(metavar="NAME", help="A healer of `lamina methods`.")] = "lora",
) -> None:
    """Train the thinned model towards the dense one; the checkpoint keeps its structure."""
    from lamina import pipeline
    from lamina.core.documents import Heal

    run = opened(folder)
    if steps is not None or minutes is not None:
        run.change(heal=Heal.from_data({"healer": healer, "steps": steps, "minutes": minutes}, where="lamina heal"))
    elif run.recipe.heal is None:
        raise InputError("for how long?", hint="--steps 200 or --minutes 10")
    with shown(run):
        pipeline.heal(run)
    say(f"healed: {run.path('model')}")


app.command(epilog="Example: lamina prove run --tasks offline --items 500")(commands.prove)
app.command(epilog="Example: lamina compare base thinned --tasks offline")(commands.compare)
app.command(epilog="Example: lamina speed run --batch 1,4 --length 128,512")(commands.speed)
app.command(epilog="Example: lamina export run --to model.gguf")(commands.export)
app.command(epilog="Example: lamina report run")(commands.report)
app.command(epilog="Example: lamina watch run")(commands.watch)


@app.command(epilog="Example: lamina anatomy smollm2-135m --certify")
def anatomy(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="As for `thin`; with --coverage none, or the parts to put together."),
    ] = None,
    certify: Annotated[bool, typer.Option("--certify", help="Print each block's residual error.")] = False,
    trust_remote_code: w.Trust = False,
    coverage: Annotated[
        bool, typer.Option("--coverage", help="Examine a tiny model of every type that the libraries know.")
    ] = False,
    library: w.Libraries = None,
    only: w.Types = None,
    shard: w.Part = None,
    out: w.Page = None,
) -> None:
    """Print the blocks and sublayers that were found, what they cost, and the proof that they are right.

    With --coverage: examine all architectures instead, or put parts together:
    `lamina anatomy --coverage --shard 1/2`, the same with 2/2, then
    `lamina anatomy --coverage coverage-*.json --out coverage.md`.
    """
    from lamina.terminal import print_anatomy, print_coverage

    if coverage:
        print_coverage(models or [], library or [], only or [], shard, out)
        return
    if len(models or []) != 1:
        raise InputError("which model?", hint="lamina anatomy MODEL, or lamina anatomy --coverage")
    if library or only or shard or out:
        raise InputError("--library, --only, --shard and --out belong to --coverage")
    print_anatomy((models or [""])[0], certify, trust_remote_code)


app.command(epilog="Example: lamina tasks --of decoder")(commands.tasks)


@app.command(epilog="Example: lamina methods --role measure")
def methods(
    role: Annotated[str | None, typer.Option(metavar="ROLE", help="measure, planner, rewrite, recipe, …")] = None,
) -> None:
    """List all methods: recipes, measures, planners, rewrites, healers, evaluators, exporters."""
    from lamina.terminal import print_methods

    print_methods(role)


@app.command(epilog="Example: lamina show finercut")
def show(name: str) -> None:
    """Show one method: what it does, its options, status, deviations and paper."""
    from lamina.terminal import print_method

    print_method(name)


@app.command(epilog="Example: lamina cite shortgpt")
def cite(name: str) -> None:
    """Print the BibTeX entry of a method's paper."""
    from lamina.core import registry

    typer.echo(registry.cite(name).bibtex())


def finish(run: Run) -> None:
    """The closing table and the report's path."""
    from lamina.terminal import print_evidence

    print_evidence(run)
    say(f"model  {run.path('model')}")
    if run.path("model.gguf").is_file():
        say(f"gguf   {run.path('model.gguf')}")
    say(f"report {run.path('report.html')}")


def main(arguments: list[str] | None = None) -> None:
    """Entry point: one line and exit code 2 for what the user can mend, 130 after Ctrl-C."""
    try:
        code = app(arguments, standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
    except LaminaError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        interrupted()
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            typer.echo(f"error: {error.format_message()} (see --help)", err=True)  # type: ignore[attr-defined]
            sys.exit(2)
        raise
    sys.exit(code if isinstance(code, int) else 0)
