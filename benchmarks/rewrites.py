"""Every kind of rewrite on one real model: what it frees, what the loss rises by, how fast the result runs.

    python benchmarks/rewrites.py [--keep 80] [--only svd-llm,laco] [--rounds 3]

Rewrites that take parameters away do so to the same share of the model's; blocks, where a method leaves the choice
open, are those of least block influence. No training but what a method itself does. Bits, masks and layouts, which free
no parameters, come behind. The loss is of held-out text; speeds are ratios to the dense model, run in turn.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence

from common import arguments, machine, opened, table, text

from lamina.anatomy import Anatomy
from lamina.core.documents import Budget, Step
from lamina.core.errors import LaminaError
from lamina.core.registry import EVALUATORS, MEASURES, PLANNERS, rewrite_of, row
from lamina.lab import Bench, Lab
from lamina.lab.order import merged
from lamina.planners._moves import factorised, least
from lamina.planners._target import Target

Makes = Callable[[Lab, float], Sequence[Step]]


def by(recipe: str, metric: str = "parameters", **options: object) -> Makes:
    """The plan of a recipe for a share of the parameters, or of another resource."""

    def make(lab: Lab, keep: float) -> Sequence[Step]:
        entry = row(recipe)
        measure = MEASURES.make(entry.measure, entry.measure_options) if entry.measure else None
        chosen = {**entry.planner_options, **({"kinds": entry.kinds} if entry.kinds else {}), **options}
        scores = measure.measure(lab) if measure else None
        planner = PLANNERS.make(entry.planner, chosen)
        return planner.plan(scores, Budget(metric=metric, keep=keep), lab.anatomy, Bench(lab, measure))

    return make


def blocks(lab: Lab, keep: float) -> list[str]:
    """The blocks of least block influence that are too many."""
    scores, target = MEASURES.make("block-influence").measure(lab), Target(Budget(keep=keep), lab.anatomy)
    gone: list[str] = []
    for site in sorted((b.site.id for b in lab.anatomy.stacks[0].blocks), key=lambda s: scores[s]):
        if target.met(gone):
            break
        gone.append(site)
    return lab.anatomy.collapse(lab.anatomy.expand(gone))  # type: ignore[return-value]


def fused(lab: Lab, keep: float) -> Sequence[Step]:
    """The blocks of least influence, fused into their neighbours."""
    return [Step(rewrite="fusegpt", sites=tuple(blocks(lab, keep)), options={"epochs": 2})]


def sparse(planner: str, rewrite: str, density: float) -> Makes:
    """Masks whose sparsity differs from place to place; that share of the parameters stays."""

    def make(lab: Lab, keep: float) -> Sequence[Step]:
        return PLANNERS.make(planner, {"rewrite": rewrite}).plan(None, Budget(keep=density), lab.anatomy, Bench(lab))

    return make


def runs(rewrite: str, size: int = 2, **options: object) -> Makes:
    """Runs of `size` neighbours that hold the blocks of least influence become one, from the last run to the first."""

    def make(lab: Lab, keep: float) -> Sequence[Step]:
        count = -(-len(blocks(lab, keep)) // (size - 1))
        scores, names = MEASURES.make("block-influence").measure(lab), [b.site.id for b in lab.anatomy.stacks[0].blocks]
        starts = sorted(range(len(names) - size), key=lambda n: sum(scores[s] for s in names[n + 1 : n + size]))
        taken: list[int] = []
        for n in starts:
            if len(taken) < count and all(abs(n - m) >= size for m in taken):
                taken.append(n)
        found = [tuple(names[n : n + size]) for n in sorted(taken, reverse=True)]
        return [Step(rewrite=rewrite, sites=s, options=options) for s in found]

    return make


def each(rewrite: str, share: float = 1.0, **options: object) -> Makes:
    """One step over that share of all blocks, the ones of least influence."""

    def make(lab: Lab, keep: float) -> Sequence[Step]:
        scores = MEASURES.make("block-influence").measure(lab)
        names = sorted((b.site.id for b in lab.anatomy.stacks[0].blocks), key=lambda s: scores[s])
        some = sorted(names[: round(share * len(names))], key=lambda s: int(s.split(".")[1]))
        return [Step(rewrite=rewrite, sites=tuple(some), options=options)]

    return make


def ranks(rewrite: str) -> Makes:
    """All maps of the blocks at one share of their parameters."""

    def make(lab: Lab, keep: float) -> Sequence[Step]:
        from lamina.lab.moments import input_moments

        anatomy = lab.anatomy
        whole, maps = anatomy.total().parameters, [m for s in anatomy.sublayers for m in anatomy.linears(s)]
        share = 1 - (1 - keep) * whole / sum(anatomy.weight(m).numel() for m in maps)
        seen = input_moments(lab, [])
        found = []
        for site in anatomy.sublayers:
            found += [m.steps[0] for m in factorised(anatomy, site, seen, [share], "svd")]
        return [Step(rewrite=rewrite, sites=s.sites, options=s.options) for s in found]

    return make


def attentions(rewrite: str, share: float, **options: object) -> Makes:
    """That share of the attentions, those of least contribution."""

    def make(lab: Lab, keep: float) -> Sequence[Step]:
        scores = MEASURES.make("cosine").measure(lab)
        names = sorted((s.id for s in lab.anatomy.sublayers if s.kind.value == "attention"), key=lambda s: scores[s])
        return [Step(rewrite=rewrite, sites=tuple(sorted(names[: round(share * len(names))])), options=options)]

    return make


def maps(rewrite: str, **options: object) -> Makes:
    """All maps of the blocks."""

    def make(lab: Lab, keep: float) -> Sequence[Step]:
        found = tuple(m.id for s in lab.anatomy.sublayers for m in lab.anatomy.linears(s))
        return [Step(rewrite=rewrite, sites=found, options=options)]

    return make


def neurons(lab: Lab, keep: float) -> Sequence[Step]:
    """Neurons of least energy, as many of every MLP, the last map refitted."""
    from lamina.core.sites import Kind
    from lamina.lab.moments import input_moments

    anatomy = lab.anatomy
    units = [u for s in anatomy.sublayers for u in anatomy.units(s, Kind.NEURON)]
    tails = [m.id for m in anatomy.linears() if m.path in {anatomy.tail(u) for u in units}]
    seen = input_moments(lab, tails)
    need = Target(Budget(keep=keep), anatomy).need / len(units)
    count = -(-need * units[0].width // anatomy.cost(units[0].id.rpartition(".")[0]).parameters)
    gone = {u.id: sorted(least(anatomy, u, seen)[: int(-(-count // 32) * 32)]) for u in units}
    return [Step(rewrite="narrow", sites=tuple(gone), options={"gone": gone, "refit": 0.01})]


ROWS: dict[str, Makes] = {
    "drop: ShortGPT": by("shortgpt"),
    "drop: damage, sublayers": by("damage"),
    "narrow: neurons, refitted": neurons,
    "narrow: Minitron": by("minitron"),
    "narrow: struct-prune": by("struct-prune"),
    "narrow: ECoFLaP": by("ecoflap"),
    "narrow: adaptive MLP": by("adaptive-mlp"),
    "slicegpt": by("slicegpt"),
    "svd": ranks("svd"),
    "asvd": ranks("asvd"),
    "svd-llm": ranks("svd-llm"),
    "svd-llm: D-Rank": by("d-rank"),
    "svd: WeLore": by("welore"),
    "merge: means of pairs": runs("merge"),
    "laco: runs of 3": runs("laco", 3),
    "share: pairs, rank 32": lambda lab, keep: [
        Step(rewrite="share", sites=s.sites, options={"rank": 32}) for s in runs("share")(lab, keep)
    ],
    "flatten: pairs": runs("flatten"),
    "mixed: drop, narrow, rank": by("mixed", moves=("drop", "narrow", "rank")),
    "fusegpt, 2 epochs": fused,
    "foldgpt: gates": by("foldgpt"),
    "foldgpt: pairs share": runs("foldgpt"),
    "sret: pairs share": runs("sret"),
    "stable-rps: pairs share": runs("stable-rps"),
    "basis-sharing: pairs": by("d-rank", size=2),
    "hesso": by("hesso"),
    "search: default, greedy": by("default"),
    "search: SLEB": by("sleb"),
    "search: beam": by("beam"),
    "search: EvoPress, blocks": by("evopress-blocks"),
    "search: EvoPress": by("evopress"),
    "search: TraceNAS": by("tracenas"),
    "search: N2N": by("n2n"),
    "layerboost": by("layerboost", metric="kv_bytes", linear=0.2),
    "mixed, healed for 8 steps": by("mixed", moves=("drop", "narrow", "rank"), probe=8),
    "parallel: 4 blocks": each("parallel", 4 / 30),
    "ladder: 4 blocks": each("ladder", 4 / 30),
    "window 64, 4 sinks: 15 attentions": attentions("window", 0.5, window=64, sinks=4),
    "linear attention: 6 attentions": attentions("linear-attention", 0.2, ridge=0.01),
    "replace by a low-rank map: 6 attentions": attentions("replace", 0.2, by="low-rank", rank=64),
    "wanda 50 %": maps("wanda", sparsity=0.5),
    "wanda 2:4": maps("wanda", pattern="2:4"),
    "wanda, OWL, 60 % stay": sparse("owl", "wanda", 0.6),
    "wanda, ER, 60 % stay": sparse("er", "wanda", 0.6),
    "wanda, SAP": sparse("sap", "wanda", 0.6),
    "SparseGPT 50 %": maps("sparsegpt", sparsity=0.5, in_turn=True),
    "SparseGPT 2:4": maps("sparsegpt", pattern="2:4", in_turn=True),
    "Q8_0, rounded": maps("round", type="Q8_0"),
    "Q4_0, rounded": maps("round", type="Q4_0"),
    "Q4_0, GPTQ": maps("gptq", type="Q4_0"),
    "Q4_0, RSQ": maps("rsq", type="Q4_0"),
    "Q4_0, SliderQuant": maps("sliderquant", type="Q4_0"),
    "Q4_0, rounded, EoRA of rank 32": maps("eora", over={"rewrite": "round", "options": {"type": "Q4_0"}}, rank=32),
}


def tried(lab: Lab, held: Lab, dense: float, make: Makes, keep: float, rounds: int) -> tuple[str, ...]:
    """One row of the table."""
    model = copy.deepcopy(lab.model)
    other = Lab(model, lab.batches, batch_size=2)
    before, began = other.anatomy.total(), time.perf_counter()
    steps = make(other, keep)
    alone = all(getattr(type(rewrite_of(s)), "removes", False) for s in steps)
    for step in steps if alone else merged(steps, other):
        rewrite_of(step).apply(step, other)
    took, after = time.perf_counter() - began, Anatomy.of(model).total()
    rise = Lab(model, held.batches).loss() - dense
    found = EVALUATORS.make("speed", {"rounds": rounds}).evaluate(Lab(model, held.batches), reference=lab.model)
    ratios = {e.name: e for e in found if e.of == "ratio"}
    speeds = [
        f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]" if e else "–" for e in map(ratios.get, ("prefill", "decode"))
    ]
    share = (after.parameters / before.parameters, after.macs / before.macs, after.kv_bytes / before.kv_bytes)
    return (*(f"{s:.3f}" for s in share), f"{rise:+.3f}", *speeds, f"{took:.0f}")


def main() -> str:
    """The table."""
    parser = arguments(__doc__)
    parser.add_argument("--keep", type=float, default=80)
    parser.add_argument("--only", default="")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    loaded = opened(given)
    lab = Lab(loaded.model, text(given, loaded, "calibration", given.sequences, 512), batch_size=2)
    held = Lab(loaded.model, text(given, loaded, "heldout", 8, 512), batch_size=2)
    dense, rows = held.loss(), []
    for name, make in ROWS.items():
        if given.only and not any(name.startswith(x) for x in given.only.split(",")):
            continue
        try:
            rows.append((name, *tried(lab, held, dense, make, given.keep / 100, given.rounds)))
        except LaminaError as error:
            rows.append((name, "", "", "", str(error)[:80], "", "", ""))
        print(*rows[-1], sep=" | ", flush=True)
    names = ("rewrite", "parameters", "MACs", "KV", "loss, nats", "prefill", "decode", "seconds")
    return f"dense {dense:.3f} nats/token; {machine(given.threads)}\n\n{table(names, rows)}"


if __name__ == "__main__":
    print(main())
