"""Prove what it cost."""

from __future__ import annotations

import lamina.words as w
from lamina.commands.screen import shown
from lamina.options import opened


def prove(folder: w.Folder) -> None:
    """Measure loss, speed, memory and size, dense and thinned side by side, on held-out text."""
    from lamina import pipeline

    run = opened(folder)
    with shown(run):
        pipeline.prove(run)
    from lamina.terminal import print_evidence

    print_evidence(run)
