"""The model card that travels with a checkpoint: what was taken out, how to load it, whose licence it is."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lamina.core.documents import Budget, Receipt

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SHOWN = 12
"""Sites named in one line before the rest is counted."""


@dataclass(frozen=True)
class Facts:
    """What the card says: the dense model's name and class, the form, what was done, within which budget."""

    name: str
    architecture: str
    form: str
    receipts: tuple[Receipt, ...]
    budget: Budget | None
    healed: Mapping[str, Any]
    tokenizer: bool
    loader: str = "AutoModelForCausalLM"
    """The name of the Auto class that loads it."""


def card(facts: Facts) -> str:
    """README.md with the front matter that model hubs read; the same facts give the same bytes."""
    title = facts.name or facts.architecture
    task = ["pipeline_tag: text-generation"] if facts.loader == "AutoModelForCausalLM" else []
    head = ["---", "library_name: transformers", *task, "tags: [lamina, layer-pruning]"]
    if HUB_ID.fullmatch(facts.name):
        head.append(f"base_model: {facts.name}")
    head += ["# license: fill in before you publish; the dense model's licence goes with its weights", "---"]
    parts = [*head, "", f"# {title}, thinned", "", _done(facts, title), "", *_table(facts), *_budget(facts.budget)]
    if facts.healed:
        rows = ", ".join(f"{k} {v}" for k, v in facts.healed.items())
        parts += ["", f"Healed: {rows}."]
    parts += ["", "## Load it", "", *_loading(facts), "", "## Licence", ""]
    parts += ["Not stated yet. The weights are the dense model's, so its licence applies to them.", ""]
    return "\n".join(parts)


def version() -> str:
    """The installed version of lamina."""
    try:
        return importlib.metadata.version("lamina")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _done(facts: Facts, title: str) -> str:
    gone = [site for receipt in facts.receipts if receipt.rewrite == "drop" for site in receipt.sites]
    what = f"without {_named(gone)}" if gone else "with nothing taken out"
    line = f"{title} ({facts.architecture}) {what}, made by lamina {version()}."
    for rewrite in dict.fromkeys(r.rewrite for r in facts.receipts if r.rewrite != "drop"):
        sites = [site for receipt in facts.receipts if receipt.rewrite == rewrite for site in receipt.sites]
        line += f" Changed by {rewrite}: {_named(sites)}."
    return line


def _named(sites: list[str]) -> str:
    more = f" and {len(sites) - SHOWN} more" if len(sites) > SHOWN else ""
    return ", ".join(f"`{s}`" for s in sites[:SHOWN]) + more


def _table(facts: Facts) -> list[str]:
    if not facts.receipts:
        return []
    before, after = facts.receipts[0].before, facts.receipts[-1].after
    rows = [
        f"| {label} | {b:,} | {a:,} | {a / b:.1%} |"
        for label, b, a in (
            ("parameters", before.parameters, after.parameters),
            ("bytes of weights", before.bytes, after.bytes),
            ("KV bytes per token", before.kv_bytes, after.kv_bytes),
            ("multiply-adds per token", before.macs, after.macs),
        )
        if b
    ]
    return ["| | dense | thinned | kept |", "| --- | ---: | ---: | ---: |", *rows]


def _budget(budget: Budget | None) -> list[str]:
    if budget is None:
        return []
    if budget.keep is not None:
        line = f"keep {budget.keep:.4g} of the {budget.metric}"
    elif budget.limit is not None:
        line = f"at most {budget.limit:,} {budget.metric}"
    else:
        line = f"drop {budget.drop} {budget.metric}"
    return ["", f"Budget: {line}."]


def _loading(facts: Facts) -> list[str]:
    trust = ", trust_remote_code=True" if facts.form == "shim" else ""
    names = f"{facts.loader}, AutoTokenizer" if facts.tokenizer else facts.loader
    code = [
        f"from transformers import {names}",
        "",
        f'model = {facts.loader}.from_pretrained("path/to/this/folder", dtype="auto"{trust})',
    ]
    if facts.tokenizer:
        code.append(f'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder"{trust})')
    why = (
        "`modeling_lamina.py` rebuilds the structure from the receipts in `config.json`; it needs torch and "
        "transformers, not lamina. Read it before you trust it."
        if facts.form == "shim"
        else f"A plain checkpoint of the stock class {facts.architecture}: no code of lamina is needed."
    )
    return [why, "", "```python", *code, "```"]
