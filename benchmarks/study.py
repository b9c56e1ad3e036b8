"""Which measure predicts the damage of leaving a site out, on five real models, and which picks the best plan.

    python benchmarks/study.py FOLDER [model ...] [--work DIR] [--without MODEL:MEASURE ...]
                                                          (FOLDER: of tools/real_models.py and real_inputs.py)

Of every model: the exact leave-one-out damage of all blocks and sublayers; every registered measure on the same
sequences (measures of heads, neurons and linear maps by the mean over those of a sublayer); Spearman's rank correlation
with the truth per kind of site, with intervals over sites (bootstrap); and the damage, on sequences that no measure saw
of the plans that drop the lowest-scored blocks, or sublayers, until 10 % and 25 % of the blocks' parameters are gone.
What is done is kept in DIR (by default beside this script) and not done again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, table
from scipy.stats import rankdata

from lamina.core.documents import Data
from lamina.core.files import to_json, write_text
from lamina.core.papers import Need
from lamina.core.registry import MEASURES
from lamina.core.scores import Scores
from lamina.core.sites import SUBLAYERS, Kind
from lamina.lab import Lab
from lamina.lab.load import load
from lamina.lab.objective import objective_of, output_of
from lamina.lab.passes import finished, own, shares, tallied
from lamina.lab.texts import prepare, prepare_inputs

MODELS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {"rows": 8, "length": 256, "dtype": "bfloat16", "batch": 4},
    "gemma3-270m": {"rows": 6, "length": 128, "dtype": "bfloat16", "batch": 3},
    "mpnet": {"rows": 16, "dtype": "float32"},
    "dinov2-small": {"rows": 12, "dtype": "float32"},
    "whisper-base": {"rows": 4, "dtype": "float32"},
}
TRUTH = "leave-one-out"
GROUPS = {"blocks": {Kind.BLOCK}, "attentions": {Kind.ATTENTION, Kind.CROSS_ATTENTION}, "MLPs": {Kind.MLP, Kind.MOE}}
BUDGETS = (0.10, 0.25)
SLOW = {"retrieval-heads", "neuron-path"}
"""Of units inside sublayers alone, and slow."""


def inputs(name: str, folder: Path) -> tuple[Any, Any, Any]:
    """The model, the sequences that measures see, and those that plans are judged on."""
    told = MODELS[name]
    path = folder / name
    spec = str(path) if (path / "config.json").is_file() else name
    if name == "gemma3-270m":
        spec = str(next(path.glob("*.gguf")))
    loaded = load(spec, dtype=told["dtype"], any_kind=True)
    given = folder / "inputs" / f"{name}.safetensors"
    if given.is_file():
        found = prepare_inputs(Data(calibration=str(given), sequences=2 * told["rows"]))
        assert found is not None
        rows = [
            {k: v[i : i + 1] for k, v in b.items()}
            for b in found.calibration
            for i in range(len(next(iter(b.values()))))
        ]
        half = min(told["rows"], len(rows) // 2)
        batch = [join(rows[i : min(i + 4, half)]) for i in range(0, half, 4)]
        rest = [join(rows[i : i + 4]) for i in range(half, len(rows), 4)]
        return loaded.model, batch, rest
    data = Data(sequences=told["rows"], heldout_sequences=told["rows"], length=told["length"])
    tokens = prepare(data, loaded.tokenizer)
    batches = [[{"input_ids": b} for b in t.split(told["batch"])] for t in (tokens.calibration, tokens.heldout)]
    return loaded.model, *batches


def join(rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows as one batch."""
    return {k: torch.cat([r[k] for r in rows]) for k in rows[0]}


def measures() -> list[str]:
    """Cheap ones first."""
    return sorted((n for n in MEASURES if n not in SLOW), key=lambda n: (MEASURES.card(n).needs, n))


class Kept:
    """What is known of one model, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"scores": {}, "plans": {}}

    def save(self) -> None:
        """Write the file, atomically."""
        write_text(self.path, to_json(self.data))


def survey(lab: Lab, kept: Kept, without: Sequence[str]) -> dict[str, Scores]:
    """Every measure's scores, and the seconds that it took where it ran by itself."""
    names = [n for n in measures() if n not in kept.data["scores"] and n not in without]
    shared = {n: m for n in names if shares(m := MEASURES.make(n))}
    for need in (Need.FORWARD, Need.GRADIENT, Need.ABLATION):
        mine = {n: m for n, m in shared.items() if m.card.needs is need}
        began = time.perf_counter()
        found = tallied(lab, mine) if mine else {}
        print(f"  {need.name.lower()} pass of {len(mine)} measures: {time.perf_counter() - began:.1f} s", flush=True)
        for name, measure in mine.items():
            keep(kept, name, finished(lab, measure, found[name]))
    for name in (n for n in names if n not in shared):
        began = time.perf_counter()
        keep(kept, name, own(lab, MEASURES.make(name)))
        print(f"  {name}: {time.perf_counter() - began:.1f} s", flush=True)
    return {
        n: Scores.from_data(kept.data["scores"][n]) if n in kept.data["scores"] else Scores.none(n, "not run")
        for n in measures()
    }


def keep(kept: Kept, name: str, scores: Scores) -> None:
    """Note one measure's scores."""
    kept.data["scores"][name] = scores.to_data()
    kept.save()


def folded(scores: Scores, lab: Lab) -> dict[str, float]:
    """Site → score, blocks and sublayers; units and linear maps as the mean over those of their sublayer."""
    found: dict[str, list[float]] = {}
    known = {s.id for s in lab.anatomy.sites}
    for site, values in scores.values.items():
        home = site if site in known else site.rpartition(".")[0]
        while home and home not in known:
            home = home.rpartition(".")[0]
        if home:
            found.setdefault(home, []).append(float(np.mean(values)))
    return {s: float(np.mean(v)) for s, v in found.items()}


def spearman(a: Sequence[float], b: Sequence[float], draws: int = 1000) -> tuple[float, float, float]:
    """Rank correlation with its 95 % interval by a bootstrap over sites."""
    x, y = np.array(a), np.array(b)
    generator = np.random.default_rng(0)

    def rho(p: np.ndarray, q: np.ndarray) -> float:
        p, q = rankdata(p), rankdata(q)
        return float(np.corrcoef(p, q)[0, 1]) if p.std() > 0 and q.std() > 0 else 0.0

    picks = generator.integers(0, len(x), (draws, len(x)))
    low, high = np.quantile([rho(x[i], y[i]) for i in picks], [0.025, 0.975])
    return rho(x, y), float(low), float(high)


@torch.no_grad()
def damage(lab: Lab, gone: Sequence[str], dense: list[torch.Tensor]) -> float:
    """Mean damage per position on the lab's text with these sites gone."""
    total, count = 0.0, 0
    with lab.ablate(gone):
        for batch, before in zip(lab.batches, dense, strict=True):
            result = lab.result(batch)
            rise, valid = objective_of(lab.model, result).rise(before, output_of(result), batch)
            total, count = total + float(rise.sum()), count + int(valid.sum())
    return total / count


def planned(scores: Mapping[str, float], lab: Lab, kinds: set[Kind], share: float) -> tuple[str, ...]:
    """The lowest-scored sites, until that share of the parameters of all blocks is gone."""
    of = {s.id: s for s in lab.anatomy.sites}
    need = share * sum(lab.anatomy.cost(b).parameters for b in lab.anatomy.of_kind(Kind.BLOCK))
    gone: list[str] = []
    for site in sorted((s for s in scores if of[s].kind in kinds), key=lambda s: (scores[s], of[s])):
        if sum(lab.anatomy.cost(s).parameters for s in gone) >= need:
            break
        gone.append(site)
    return tuple(gone)


def study(name: str, folder: Path, work: Path, without: Sequence[str] = ()) -> dict[str, Any]:
    """All figures of one model."""
    print(name, flush=True)
    kept = Kept(work / f"{name}.json")
    model, seen, unseen = inputs(name, folder)
    lab = Lab(model, seen)
    tables = {n: folded(s, lab) for n, s in survey(lab, kept, without).items()}
    truth = tables[TRUTH]
    of = {s.id: s.kind for s in lab.anatomy.sites}
    rows: dict[str, dict[str, Any]] = {n: {} for n in tables}
    for measure, scores in tables.items():
        for group, kinds in GROUPS.items():
            sites = [s for s in truth if s in scores and of[s] in kinds]
            if len(sites) > 3:
                rows[measure][group] = spearman([scores[s] for s in sites], [truth[s] for s in sites])
    other = Lab(model, unseen, anatomy=lab.anatomy)
    with torch.no_grad():
        dense = [output_of(other.result(b)) for b in other.batches]
    for measure, scores in tables.items():
        for what, kinds in (("blocks", {Kind.BLOCK}), ("sublayers", set(SUBLAYERS))):
            if sum(of[s] in kinds for s in scores) < sum(k in kinds for k in of.values()):
                continue
            for share in BUDGETS:
                gone = planned(scores, lab, kinds, share)
                key = " ".join(sorted(gone))
                if key not in kept.data["plans"]:
                    kept.data["plans"][key] = damage(other, gone, dense)
                    kept.save()
                rows[measure][f"{what} {share:.0%}"] = kept.data["plans"][key]
    return rows


def page(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The tables, measures in the order of their mean correlation over all models and kinds."""
    names = list(next(iter(found.values())))

    def mean(measure: str) -> float:
        values = [r[g][0] for r in (m[measure] for m in found.values()) for g in GROUPS if g in r]
        return float(np.mean(values)) if values else -2.0

    parts = []
    ordered = [n for n in sorted(names, key=mean, reverse=True) if mean(n) > -2]
    columns = [f"{m}, {g}" for m in found for g in GROUPS]
    rows = [
        (n, f"{mean(n):.2f}", *(cell(found[m][n].get(g)) for m in found for g in GROUPS)) for n in ordered if n != TRUTH
    ]
    parts.append("Rank correlation with the true leave-one-out damage\n\n" + table(("measure", "mean", *columns), rows))
    for share in BUDGETS:
        kinds = [f"{w} {share:.0%}" for w in ("blocks", "sublayers")]
        columns = [f"{m}, {k.split()[0]}" for m in found for k in kinds]
        rows = [(n, *(number(found[m][n].get(k)) for m in found for k in kinds)) for n in ordered]
        parts.append(
            f"Damage on unseen sequences with {share:.0%} of the parameters gone\n\n"
            + table(("measure", *columns), rows)
        )
    return "\n\n".join(parts)


def cell(value: Sequence[float] | None) -> str:
    return "" if value is None else f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def main() -> str:
    """The tables of all models that were studied."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work" / "study")
    parser.add_argument("--without", nargs="*", default=[])
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    apart = [entry.partition(":") for entry in given.without]
    found = {n: study(n, given.folder, given.work, [m for k, _, m in apart if k == n]) for n in given.models}
    return f"{machine(given.threads)}\n\n{page(found)}"


if __name__ == "__main__":
    print(main())
