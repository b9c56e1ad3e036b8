"""mergekit: a run of blocks left out by `passthrough`. It has no measure: the run is given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from common import given, told

ARGS = given()


def work() -> None:
    """The slices before and behind the run, by its own command."""
    depth = json.loads((ARGS.model / "config.json").read_text())["num_hidden_layers"]
    parts = [(0, ARGS.span[0]), (ARGS.span[1], depth)]
    rows = "".join(f"  - sources: [{{model: {ARGS.model}, layer_range: [{a}, {b}]}}]\n" for a, b in parts)
    recipe = ARGS.out.with_suffix(".yaml")
    recipe.write_text(f"slices:\n{rows}merge_method: passthrough\ndtype: bfloat16\n")
    command = Path(sys.executable).with_name("mergekit-yaml")
    subprocess.run([command, recipe, ARGS.out], check=True, stdout=sys.stderr)


told(work)
