"""The model card that travels with a checkpoint: what was taken out, how to load it, whose licence it is."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lamina.core.documents import Budget, Evidence, EvidenceFile, Plan, Receipt
from lamina.core.papers import Paper

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


@dataclass(frozen=True, kw_only=True)
class More:
    """What an exported folder's card says beyond: the plan, what was measured, whom to cite, how it is loaded.

    `licence` is the base's, where it is known.
    """

    plan: Plan | None = None
    evidence: EvidenceFile | None = None
    papers: tuple[Paper, ...] = ()
    licence: str = ""
    loading: tuple[str, ...] = ()
    library: str = "transformers"


def card(facts: Facts, more: More | None = None) -> str:
    """README.md with the front matter that model hubs read; the same facts give the same bytes."""
    more = more or More()
    title = facts.name or facts.architecture
    task = ["pipeline_tag: text-generation"] if facts.loader == "AutoModelForCausalLM" else []
    head = ["---", f"library_name: {more.library}", *task, "tags: [lamina, layer-pruning]"]
    if HUB_ID.fullmatch(facts.name):
        head.append(f"base_model: {facts.name}")
    own = f"license: {more.licence.lower()}"
    head += [own if more.licence else "# license: fill in before you publish; the dense model's goes with its weights"]
    head += ["---"]
    parts = [*head, "", f"# {title}, thinned", "", _done(facts, title), "", *_table(facts), *_budget(facts.budget)]
    if facts.healed:
        rows = ", ".join(f"{k} {v}" for k, v in facts.healed.items())
        parts += ["", f"Healed: {rows}."]
    parts += _plan(more.plan) + _evidence(more.evidence)
    parts += ["", "## Load it", "", *(more.loading or _loading(facts)), "", "## Licence", ""]
    known = f"{more.licence}, the dense model's: it" if more.licence else "Not stated yet. The dense model's licence"
    parts += [f"{known} applies to the weights.", *_citations(more.papers), ""]
    return "\n".join(parts)


def _plan(plan: Plan | None) -> list[str]:
    """Every step of the plan, with what it was chosen by."""
    if plan is None:
        return []
    rows = []
    for step in plan.steps:
        why = ", ".join(f"{k} {v:.4g}" for k, v in list(step.why.items())[:SHOWN])
        rows.append(f"| {step.rewrite} | {_named(list(step.sites))} | {why} |")
    return [
        "",
        f"## Plan, by the recipe `{plan.recipe}`",
        "",
        "| rewrite | sites | why |",
        "| --- | --- | --- |",
        *rows,
    ]


def _evidence(found: EvidenceFile | None) -> list[str]:
    """Every measured number with its 95 % interval, and what was noted."""
    if found is None:
        return []
    rows = [f"| {e.name} | {e.of} | {_measured(e)} | {e.n or ''} | {e.how} |" for e in found.evidence]
    head = ["| what | of | value, 95 % interval | n | how |", "| --- | --- | ---: | ---: | --- |"]
    return ["", "## Evidence", "", *head, *rows]


def _measured(e: Evidence) -> str:
    bounds = e.of != "contract" and e.low is not None and e.high is not None
    spread = f" [{e.low:.4g}, {e.high:.4g}]" if bounds else f" (at most {e.high:.1g})" if e.high is not None else ""
    return f"{e.value:.5g}{spread}{' ' + e.unit if e.unit else ''}"


def _citations(papers: tuple[Paper, ...]) -> list[str]:
    if not papers:
        return []
    return ["", "## Cite", "", "```bibtex", *(p.bibtex() for p in papers), "```"]


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
