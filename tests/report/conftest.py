"""Synthetic run folders, written through the core documents: 30 blocks like SmolLM2-135M, 80 and 12."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest

from lamina.core import registry
from lamina.core.documents import (
    Budget,
    Data,
    Evidence,
    EvidenceFile,
    Heal,
    ModelRef,
    Plan,
    Receipt,
    Receipts,
    Recipe,
    Step,
)
from lamina.core.papers import Paper
from lamina.core.sites import Cost

ATTENTION = Cost(885_312, 1_770_624, 884_736, 768)
MLP = Cost(2_654_784, 5_309_568, 2_654_208, 0)
REST = Cost(28_312_128, 56_624_256, 28_311_552, 0)
SHA = "sha256:" + "3f9a5c1e" * 8

PAPER = Paper(
    key="doe2024layers",
    title="What the Layers Do: Redundancy & Depth",
    authors=("Jane Doe", "Max Muster", "Anna Smith"),
    year=2024,
    arxiv="2406.15786",
)


def damage(block: int, depth: int, kind: str) -> float:
    """A plausible rise of the loss in nats: large at both ends, uneven between."""
    at = block / (depth - 1)
    edge = 4.0 * math.exp(-at * depth / 0.9) + 1.2 * math.exp(-(1 - at) * depth / 0.7)
    wobble = 0.5 + 0.45 * math.sin(2.7 * block + (1.3 if kind == "mlp" else 0.0))
    base = 0.11 if kind == "mlp" else 0.05
    spike = 1.1 if kind == "mlp" and block == round(0.37 * depth) else 0.0
    return edge * (2.2 if kind == "mlp" else 1.0) + base * (0.6 + wobble) + spike


def survey(depth: int) -> pl.DataFrame:
    """Three measures: damage and cosine of the sublayers, influence of the blocks."""
    rows: list[dict[str, object]] = []

    def row(site: str, kind: str, block: int, measure: str, value: float, scale: str, cost: Cost) -> None:
        costs = {"parameters": cost.parameters, "bytes": cost.bytes, "macs": cost.macs, "kv_bytes": cost.kv_bytes}
        head = {"site": site, "kind": kind, "block": block, "unit": 0, "measure": measure}
        tail = {"tokens": 4096, "seed": 0, "fingerprint": SHA}
        rows.append({**head, "value": value, "stderr": abs(value) * 0.14, "scale": scale, **costs, **tail})

    for block in range(depth):
        for kind, cost in (("attention", ATTENTION), ("mlp", MLP)):
            value = damage(block, depth, kind)
            site = f"block.{block}.{kind}"
            row(site, kind, block, "damage", value, "nats", cost)
            row(site, kind, block, "cosine", 0.01 + 0.12 * value * (1.2 + math.sin(5.1 * block)), "", cost)
        both = damage(block, depth, "attention") + damage(block, depth, "mlp")
        row(f"block.{block}", "block", block, "block-influence", 0.02 + 0.08 * both, "", ATTENTION + MLP)
    return pl.DataFrame(rows)


def planned(depth: int) -> list[tuple[str, ...]]:
    """The sites to take out, by steps: cheap MLPs, some attentions, one whole block."""
    ranked = sorted(range(2, depth - 1), key=lambda b: damage(b, depth, "mlp"))
    whole = ranked[0]
    mlps = [(f"block.{b}.mlp",) for b in ranked[1 : 1 + (3 * depth) // 8]]
    cheap = sorted((b for b in range(2, depth) if b != whole), key=lambda b: damage(b, depth, "attention"))
    return [(f"block.{whole}.attention", f"block.{whole}.mlp"), *mlps, *((f"block.{b}.attention",) for b in cheap[:2])]


def costs(depth: int, groups: list[tuple[str, ...]]) -> list[Cost]:
    """The whole model's cost before the first step and after each."""
    whole = REST
    for _ in range(depth):
        whole = whole + ATTENTION + MLP
    found = [whole]
    for sites in groups:
        for site in sites:
            whole = whole - (MLP if site.endswith("mlp") else ATTENTION)
        found.append(whole)
    return found


def evidence(before: Cost, after: Cost, *, slow: bool) -> EvidenceFile:
    """All that prove measures."""
    how = "paired bootstrap over sequences"
    speed = {"prefill": (0.99, 0.95, 1.04), "decode": (0.94, 0.91, 0.97)} if slow else {"prefill": (1.31, 1.28, 1.34)}
    speed.setdefault("decode", (1.22, 1.17, 1.27))
    found = [
        Evidence(name="perplexity", of="dense", value=20.21, low=18.9, high=21.7, n=32),
        Evidence(name="perplexity", of="thinned", value=30.98, low=28.8, high=33.3, n=32),
        Evidence(name="perplexity", of="ratio", value=1.533, low=1.481, high=1.587, n=32, how=how),
        Evidence(name="loss", of="dense", value=3.0062, n=32, unit="nats/token"),
        Evidence(name="loss", of="thinned", value=3.4333, n=32, unit="nats/token"),
        Evidence(name="loss", of="difference", value=0.4271, low=0.3927, high=0.4618, n=32, how=how),
        Evidence(name="kl", of="thinned", value=0.5122, low=0.471, high=0.556, n=32, unit="nats/token"),
        Evidence(name="expected_loss", of="difference", value=0.3914),
        Evidence(name="peak_memory", of="dense", value=803_000_000, n=3),
        Evidence(name="peak_memory", of="thinned", value=668_000_000, n=3),
    ]
    for name, dense in (("prefill", 1242.0), ("decode", 31.4)):
        value, low, high = speed[name]
        note = "5 interleaved rounds, 256 tokens"
        found.append(Evidence(name=name, of="dense", value=dense, n=5, unit="tokens/s"))
        found.append(Evidence(name=name, of="thinned", value=dense * value, n=5, unit="tokens/s"))
        found.append(Evidence(name=name, of="ratio", value=value, low=low, high=high, n=5, how=note))
    for name in ("parameters", "bytes", "kv_bytes"):
        found.append(Evidence(name=name, of="dense", value=getattr(before, name)))
        found.append(Evidence(name=name, of="thinned", value=getattr(after, name)))
    for name, value in (("reload_logits", 0.0), ("reload_cache", 2.1e-5), ("reload_padding", 3.4e-5)):
        found.append(Evidence(name=name, of="contract", value=value, high=1e-3, unit="logits"))
    found.append(Evidence(name="reload_generate", of="contract", value=1, how="16 tokens, greedy"))
    notes = (
        "transformers: loads with trust_remote_code=True; the shim file travels with the weights",
        "llama.cpp: as GGUF of architecture deci; a dropped MLP is written 32 wide and zero",
        "vLLM: not tried; a DeciLM config can be exported where only attentions are gone",
    )
    return EvidenceFile(evidence=tuple(found), notes=notes)


def write_run(
    folder: Path, *, depth: int = 30, slow: bool = False, healed: bool = False, name: str = "SmolLM2-135M-Instruct"
) -> Path:
    """A whole run folder."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    groups = planned(depth)
    totals = costs(depth, groups)
    budget = Budget(keep=0.75, protect=("block.0", f"block.{depth - 1}.mlp"))
    reference = ModelRef(name=name, fingerprint=SHA)
    steps = tuple(
        Step(
            rewrite="drop",
            sites=sites,
            why={
                "damage": sum(damage(int(s.split(".")[1]), depth, s.rsplit(".", 1)[1]) for s in sites),
                "rate": 0.021 + 0.004 * i,
            },
        )
        for i, sites in enumerate(groups)
    )
    receipts = tuple(
        Receipt(rewrite="drop", sites=sites, before=totals[i], after=totals[i + 1]) for i, sites in enumerate(groups)
    )
    history = [{"step": 10 * i, "loss": 0.52 * math.exp(-i / 9) + 0.21 + 0.01 * math.sin(i * 2.3)} for i in range(41)]
    done = {"healer": "lora", "steps": 400, "minutes": 11.5, "rank": 16, "history": history} if healed else {}
    heal = Heal(steps=400) if healed else None
    Recipe(name="taken", model=name, budget=budget, heal=heal, data=Data()).save(folder / "recipe.yaml")
    expects = {"loss": 0.3914, "parameters": float(totals[-1].parameters)}
    plan = Plan(model=reference, recipe="taken", budget=budget, steps=steps, expects=expects)
    plan.save(folder / "plan.yaml")
    Receipts(model=reference, plan=SHA, receipts=receipts, healed=done).save(folder / "receipts.json")
    evidence(totals[0], totals[-1], slow=slow).save(folder / "evidence.json")
    survey(depth).write_parquet(folder / "survey.parquet")
    return folder


def enter_methods(patch: pytest.MonkeyPatch) -> None:
    """A registry that holds only the methods of these folders."""

    @dataclass(frozen=True, kw_only=True)
    class Damage:
        """Expected rise of the loss when the site is taken out, to second order."""

    @dataclass(frozen=True, kw_only=True)
    class Greedy:
        """Take the site with the least damage per parameter, price the rest again, repeat."""

    @dataclass(frozen=True, kw_only=True)
    class Drop:
        """Take sublayers out: not computed, not stored, no KV entry."""

    @dataclass(frozen=True, kw_only=True)
    class Lora:
        """Low-rank adapters trained against the dense model's logits, then merged."""

    patch.setattr(registry, "discover", lambda: None)
    patch.setattr(registry, "_ROWS", {})
    for role in registry.ROLES.values():
        patch.setattr(role, "_classes", {})
    deviation = "labels are drawn from the model, not taken from the text"
    registry.measure("damage", PAPER, status="stable", deviations=(deviation,))(Damage)
    registry.planner("greedy")(Greedy)
    registry.rewrite("drop", status="stable")(Drop)
    other = Paper(
        key="roe2021",
        title="Low-Rank Updates",
        authors=("A. Roe", "B. Poe"),
        year=2021,
        url="javascript:x",
        venue="ICLR",
    )
    registry.healer("lora", other)(Lora)
    summary = "Second-order damage, greedy by damage per parameter."
    registry.recipe("taken", PAPER, summary=summary, measure="damage", planner="greedy", status="stable")


@pytest.fixture(autouse=True)
def known_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test in this folder sees the small registry."""
    enter_methods(monkeypatch)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A complete run with 30 blocks."""
    return write_run(tmp_path / "run")


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Build a run folder with other options."""
    return lambda **options: write_run(tmp_path / "other", **options)
