"""Apply a plan, or a patch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import lamina.words as w
from lamina.commands.screen import say, shown
from lamina.core.errors import InputError
from lamina.options import opened


def apply(
    folder: Annotated[str, typer.Argument(metavar="RUN|BASE", help="A run folder; or, for a patch, its base model.")],
    patch: Annotated[
        Path | None, typer.Argument(metavar="[PATCH]", help="A folder that `export --format patch` wrote.")
    ] = None,
    to: Annotated[Path | None, typer.Option(metavar="DIR", help="Of a patch: the folder to write.")] = None,
    trust_remote_code: w.Trust = False,
) -> None:
    """Do what the plan says, or a patch; what comes out is published only if it reloads exactly in a fresh process."""
    if patch is not None:
        _patched(folder, patch, to, trust_remote_code)
        return
    if to is not None or trust_remote_code:
        raise InputError("they belong to a patch", where="--to, --trust-remote-code", hint="lamina apply BASE PATCH")
    from lamina import pipeline

    run = opened(Path(folder))
    with shown(run):
        receipts = pipeline.apply(run)
    if receipts.receipts:
        before, after = receipts.receipts[0].before, receipts.receipts[-1].after
        say(f"{before.parameters:,} parameters became {after.parameters:,}")
    else:
        say("the plan drops nothing")
    say(str(run.path("model")))


def _patched(base: str, patch: Path, to: Path | None, trust_remote_code: bool) -> None:
    if to is None:
        raise InputError("where to?", where="--to", hint="lamina apply BASE PATCH --to DIR")
    from lamina.pipeline.patching import apply_patch

    for path in apply_patch(base, patch, to, trust_remote_code=trust_remote_code, say=say):
        say(str(path))
