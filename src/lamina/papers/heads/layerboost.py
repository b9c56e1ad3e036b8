"""LayerBoost: attentions that matter little go, those that matter more become linear in a window, the others stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from lamina.core.documents import Receipt, Step
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import planner, recipe, rewrite
from lamina.core.sites import SUBLAYERS, Cost, Kind
from lamina.planners.lowest import Lowest
from lamina.rewrites._maps import number_for
from lamina.rewrites.attention import Attend, core_of
from lamina.rewrites.drop import Problem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lamina.anatomy import Anatomy
    from lamina.core.documents import Budget
    from lamina.core.scores import Scores
    from lamina.lab import Lab
    from lamina.lab.bench import Bench
    from lamina.lab.walk import Walk

PAPER = Paper(
    key="souibgui2026layerboost",
    title="LayerBoost: Layer-Aware Attention Reduction for Efficient LLMs",
    authors=(
        "Mohamed Ali Souibgui",
        "Jan Fostier",
        "Rodrigo Abadía-Heredia",
        "Bohdan Denysenko",
        "Christian Marschke",
        "Igor Peric",
    ),
    year=2026,
    arxiv="2604.22050",
)
FEATURES = ("elu", "relu")


@rewrite(
    "linear-attention",
    PAPER,
    on=Kind.ATTENTION,
    needs=Need.FORWARD,
    deviations=(
        "the kernel, elu + 1 behind the rotary embedding, is inferred: only the abstract and digests were at hand",
        "nothing is distilled: the output map alone is fitted, in closed form, to what it made of softmax attention",
        "the cache holds the keys and values of all tokens, and no running sums: a decoded token reads them, or those "
        "of the window, and no memory is saved",
    ),
)
@dataclass(frozen=True, kw_only=True)
class LinearAttention(Attend):
    """Softmax attention becomes Σ φ(q)·φ(k) v / Σ φ(q)·φ(k) over the tokens so far, or the last `options["window"]`.

    φ is elu + 1 or relu by `feature`, of queries and keys behind rotary embedding and norms, each times the root of
    the softmax's scale; caps of logits go. All four maps stay. `ridge` above 0 fits the output map W to the text: with
    z its inputs before and u after, W' = W (Σ z uᵀ + r I)(Σ u uᵀ + r I)⁻¹, r = ridge · mean diag Σ u uᵀ, in depth order
    on the stream that the changed network really sees; three runs of each block of the step. `window` is one number,
    or one for each site; 0 or none: all tokens. Parameters and KV bytes stay.
    """

    card: ClassVar[Card]
    known_failures: ClassVar[Mapping[str, str]] = {
        "check_costs_do_not_grow": "torch counts no products of fused softmax attention on a CPU, and these it counts"
    }
    each: ClassVar[tuple[str, ...]] = ("window",)
    numbers: ClassVar[Mapping[str, int]] = {"window": 0}

    feature: str = "elu"
    ridge: float = 0.01

    def __post_init__(self) -> None:
        if self.feature not in FEATURES:
            raise ValueError(f"feature is one of {', '.join(FEATURES)}, not {self.feature!r}")
        if not self.ridge >= 0:
            raise ValueError(f"ridge is not below 0, not {self.ridge:g}")

    def told(self, step: Step) -> Self:
        """The method with the options that the step tells. Raises ValueError for those that make no sense."""
        names = [f.name for f in dataclasses.fields(self)]
        return dataclasses.replace(self, **{n: step.options[n] for n in names if n in step.options})

    def settings(self, step: Step, site: str) -> dict[str, Any]:
        """The feature, and the window where there is one."""
        window = number_for(step, "window", site) if "window" in step.options else 0
        return {"feature": self.told(step).feature, **({"window": window} if window else {})}

    def check(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What stands in the way; needs no weights."""
        try:
            method = self.told(step)
        except (TypeError, ValueError) as error:
            return [Problem(step.rewrite, str(error))]
        problems = super().check(step, anatomy)
        for site in step.sites if not problems else ():
            stack = anatomy.stack(site)
            if method.ridge and (stack.looped or not stack.linked):
                problems.append(Problem(site, "its blocks can't be run one by one", "ridge: 0 fits nothing"))
            elif not _last_map(anatomy, site):
                problems.append(Problem(site, "it has no linear map of its own", "drop it, or leave it"))
        return problems

    def forecast(self, step: Step, anatomy: Anatomy) -> Cost:
        """As before but for the products between the maps, per token on the anatomy's sample of at most 128 tokens."""
        from lamina.anatomy.linears import is_linear, matrix

        total = super().forecast(step, anatomy)
        tokens = next(x for x in anatomy.sample.values() if hasattr(x, "shape")).shape[1]
        for site in step.sites:
            maps = [matrix(m) for m in core_of(anatomy, site)[1].modules() if is_linear(m)]
            before = anatomy.branch(site).macs - sum(m.numel() for m in maps)
            total += Cost(macs=2 * tokens * maps[-1].shape[1] - before)
        return total

    def change(self, step: Step, lab: Lab, receipt: Receipt) -> None:
        """Block by block: switch the attention, then fit its output map."""
        method = self.told(step)
        if not method.ridge:
            self.replay(receipt, lab.model)
            return
        from lamina.lab.walk import Walk
        from lamina.rewrites.lamina_attention import attend

        for place, stack in enumerate(lab.anatomy.stacks):
            parts = [[x.site.id for x in b.branches if x.site.id in step.sites] for b in stack.blocks]
            last = max((n for n, sites in enumerate(parts) if sites), default=-1)
            walk = Walk(lab, (), place) if last >= 0 else None
            for number, sites in enumerate(parts[: last + 1]):
                assert walk is not None
                for site in sites:
                    module: Any = lab.model.get_submodule(_last_map(lab.anatomy, site))
                    before = _entering(walk, module)
                    attend(lab.model, {"modules": {core_of(lab.anatomy, site)[0]: self.settings(step, site)}})
                    _fit(module, before, _entering(walk, module), method.ridge)
                    lab.progress(self.card.name, step.sites.index(site) + 1, len(step.sites))
                if number < last:
                    walk.step()

    @staticmethod
    def remarks(receipt: Receipt) -> Iterator[str]:
        """What the costs do not tell."""
        yield (
            f"linear-attention: {len(receipt.sites)} attentions take time in proportion to a text's length, or to "
            "their window; transformers' cache still holds the keys and values of all tokens, so no memory is saved"
        )

    @staticmethod
    def examples(anatomy: Anatomy) -> tuple[Step, ...]:
        """Steps that the conformance suite tries: two attentions fitted, and two with features or a window."""
        sites = [s.id for s in anatomy.of_kind(Kind.ATTENTION)]
        steps = (
            Step(rewrite="linear-attention", sites=tuple(sites[1:3])),
            Step(
                rewrite="linear-attention", sites=tuple(sites[:2]), options={"window": 4, "ridge": 0, "feature": "relu"}
            ),
        )
        return tuple(s for s in steps if not LinearAttention().check(s, anatomy))


def _last_map(anatomy: Anatomy, site: str) -> str:
    """The path of the map behind an attention, the last of its own; '' where there is none."""
    from lamina.anatomy.linears import is_linear

    path, core = core_of(anatomy, site)
    own = [name for name, module in core.named_modules() if is_linear(module)]
    return f"{path}.{own[-1]}" if own else ""


def _entering(walk: Walk, module: nn.Module) -> list[Tensor]:
    """What enters a map of the walk's block as it is, batch by batch [tokens, inputs], padding gone."""
    from lamina.lab.lab import real

    met: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: met.append(args[0].detach()))
    try:
        walk.run()
    finally:
        handle.remove()
    return [x[real(batch).to(x.device)] for x, batch in zip(met, walk.lab.batches, strict=True)]


def _fit(module: Any, before: list[Tensor], after: list[Tensor], ridge: float) -> None:
    """Let a map make of its inputs as they are what it made of those before, by least squares."""
    import torch

    from lamina.anatomy.linears import matrix
    from lamina.rewrites.narrow import write

    weight = matrix(module).detach().double()
    cross, gram = torch.zeros_like(weight.T @ weight), torch.zeros_like(weight.T @ weight)
    for z, u in zip(before, after, strict=True):
        cross += z.double().T @ u.double()
        gram += u.double().T @ u.double()
    level = (ridge * gram.diagonal().mean()).clamp_min(1e-30) * torch.eye(len(gram), dtype=gram.dtype)
    write(module, torch.linalg.solve(gram + level, weight @ (cross + level), left=False))


@planner(
    "layerboost",
    PAPER,
    on=tuple(sorted(SUBLAYERS)),
    deviations=(
        "scores are the caller's, such as the rise of the loss without a site; the paper takes benchmarks",
        "how many go is what the budget asks for; of those left, the share `linear` becomes linear",
    ),
)
@dataclass(frozen=True, kw_only=True)
class LayerBoost:
    """Drop the sites of lowest score until the budget is met; of the attentions left, the lowest become linear.

    `linear` is their share of the attentions that are left and not protected, rounded to the nearest; `window` how many
    tokens they see (0: all). `kinds` restricts what is dropped (none: all sublayers).
    """

    card: ClassVar[Card]

    kinds: tuple[Kind, ...] = ()
    linear: float = 0.0
    window: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.linear <= 1:
            raise ValueError(f"linear lies in [0, 1], not {self.linear:g}")
        if self.window < 0:
            raise ValueError(f"window is not below 0, not {self.window}")

    def plan(self, scores: Scores, budget: Budget, anatomy: Anatomy, bench: Bench | None = None) -> tuple[Step, ...]:
        """A step for each site that goes, and one for those that become linear. Raises InputError as `lowest`."""
        steps = Lowest(kinds=self.kinds).plan(scores, budget, anatomy, bench)
        if not steps or not self.linear:
            return steps
        gone = anatomy.expand([s for step in steps for s in step.sites]) | anatomy.expand(budget.protect)
        left = [s.id for s in anatomy.of_kind(Kind.ATTENTION) if s.id not in gone and s.id in scores]
        method, options = LinearAttention(), {"window": self.window} if self.window else {}
        able = [
            s
            for s in sorted(left, key=lambda s: scores[s])
            if not method.check(Step(rewrite="linear-attention", sites=(s,), options=options), anatomy)
        ]
        chosen = set(able[: round(self.linear * len(left))])
        if not chosen:
            return steps
        why = {scores.measure: max(scores[s] for s in chosen)}
        sites = tuple(s for s in left if s in chosen)
        return (*steps, Step(rewrite="linear-attention", sites=sites, options=options, why=why))


recipe(
    "layerboost",
    PAPER,
    summary="LayerBoost: attentions without which the loss rises least go, the next ones become linear in a window.",
    measure="leave-one-out",
    planner="layerboost",
    kinds=(Kind.ATTENTION,),
    planner_options={"linear": 0.5},
    deviations=("the loss on calibration text stands for benchmarks", "no distillation but what the recipe heals by"),
)
