"""Apply a plan."""

from __future__ import annotations

import lamina.words as w
from lamina.commands.screen import say, shown
from lamina.options import opened


def apply(folder: w.Folder) -> None:
    """Do what the plan says; the checkpoint is published only if it reloads exactly in a fresh process."""
    from lamina import pipeline

    run = opened(folder)
    with shown(run):
        receipts = pipeline.apply(run)
    if receipts.receipts:
        before, after = receipts.receipts[0].before, receipts.receipts[-1].after
        say(f"{before.parameters:,} parameters became {after.parameters:,}")
    else:
        say("the plan drops nothing")
    say(str(run.path("model")))
