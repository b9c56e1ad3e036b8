"""SliceGPT: the stream turned to its principal axes, and those of least energy cut off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lamina.core.documents import Receipt, Step
from lamina.core.errors import InputError, LaminaError
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import planner, recipe, rewrite
from lamina.core.sites import Cost, Kind
from lamina.planners._widths import FAILS, NARROWS, Shape, expect_counted, sites_of
from lamina.rewrites.drop import Problem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lamina.anatomy import Anatomy
    from lamina.core.documents import Budget
    from lamina.core.scores import Scores
    from lamina.lab import Lab
    from lamina.lab.bench import Bench

PAPER = Paper(
    key="ashkboos2024slicegpt",
    title="SliceGPT: Compress Large Language Models by Deleting Rows and Columns",
    authors=("Saleh Ashkboos", "Maximilian L. Croci", "Marcelo Gennari do Nascimento", "Torsten Hoefler",
             "James Hensman"),
    year=2024,
    arxiv="2401.15024",
)  # fmt: skip
TIE = "tie_word_embeddings"


@rewrite(
    "slicegpt",
    PAPER,
    on=Kind.CHANNEL,
    needs=Need.FORWARD,
    deviations=(
        "one rotation for the whole stream and not one per sublayer: no shortcut matrices, a plain smaller model",
        "RMSNorms alone; LayerNorms are not made into them",
        "the rotation is that of the dense network's streams at all norms, each token in units of its own size",
        "no random rotation of what stays, and no training",
    ),
)
@dataclass(frozen=True, kw_only=True)
class SliceGpt:
    """Turn the stream to its principal axes and keep the first `options["width"]` of them (site → number).

    Gains of norms go into the maps that read them; the network is then the same in any orthogonal basis, which is
    certified on the sample before anything is cut. Norms divide by the root mean square over the dense width. A head
    that shares its weights with the embedding gets its own. One forward over the text.
    """

    card: ClassVar[Card]
    each: ClassVar[tuple[str, ...]] = ("width",)

    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.damping < 0:
            raise ValueError(f"damping is at least 0, not {self.damping:g}")

    def check(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What stands in the way; needs no weights."""
        from lamina.rewrites._rotate import refused

        given = step.options.get("width")
        if not step.sites or not isinstance(given, Mapping):
            return [Problem("slicegpt", "the step names no width", "options: {width: {channel: number}}")]
        problems = []
        stack, *others = anatomy.stacks
        for name in step.sites:
            try:
                site = anatomy.site(name)
            except LaminaError:
                site = None
            if site is None or site.kind is not Kind.CHANNEL:
                problems.append(Problem(name, "the model has no such stream of channels"))
            elif not isinstance(width := given.get(name), int) or not 0 < width < site.width:
                problems.append(Problem(name, f"a width lies between 1 and {site.width - 1}, not at {given.get(name)}"))
            elif others:
                problems.append(Problem(name, "the channels of one stack among several can't be cut"))
            elif reason := refused(anatomy, stack):
                problems.append(Problem(name, reason))
        return problems

    def forecast(self, step: Step, anatomy: Anatomy) -> Cost:
        """What the whole model will take; equals the receipt's `after`."""
        from lamina.rewrites._narrow_costs import narrowed_cost

        (name,) = step.sites
        return narrowed_cost(anatomy, {name: _gone(step, anatomy)}) + _untied(anatomy, step.options["width"][name])

    def apply(self, step: Step, lab: Lab) -> Receipt:
        """Turn and cut the stream of `lab.model`. Raises UnsupportedError before anything is changed."""
        from lamina.rewrites import _rotate
        from lamina.rewrites._narrow_config import said_by_config, told, undone_on_error, widths_of
        from lamina.rewrites.structure import replay

        for problem in self.check(step, lab.anatomy):
            raise problem.error()
        anatomy, model = lab.anatomy, lab.model
        site = anatomy.site(step.sites[0])
        before, after = anatomy.total(), self.forecast(step, anatomy)
        gone = _gone(step, anatomy)
        held = _rotate.basis(anatomy, anatomy.stacks[0])
        cut = {"format": 1, "kind": "narrow", **anatomy.without_units(site, gone)}
        steps: list[dict[str, Any]] = [*_apart(cut, held.untied, model), cut]
        said = said_by_config(anatomy, widths_of(anatomy, [site], {site.id: gone}), steps)
        q = self.axes(_rotate.energies(lab, list(held.norms)))
        proof = _rotate.Proof(anatomy)
        with _rotate.kept_weights(model), undone_on_error(model):
            _rotate.turn(model, held, q)
            proof.expect()
            _rotate.scale_gains(model, held, (site.width / (site.width - len(gone))) ** 0.5)
            replay(model, steps)
            steps += [said] if said and told(anatomy, said) else []
            lab.renew()
        return Receipt(
            rewrite=self.card.name, sites=step.sites, before=before, after=after, options=step.options,
            structure={"steps": steps},
        )  # fmt: skip

    def axes(self, energy: Tensor) -> Tensor:
        """Orthonormal columns, those of most energy first, float64 [width, width]."""
        import torch

        eye = torch.eye(len(energy), dtype=energy.dtype, device=energy.device)
        _, vectors = torch.linalg.eigh(energy + self.damping * energy.diagonal().mean() * eye)
        return vectors.flip(1)

    def replay(self, receipt: Receipt, skeleton: nn.Module, anatomy: Anatomy | None = None) -> None:
        """Rebuild the structure on a model of the dense class, on any device, meta included."""
        from lamina.rewrites.structure import replay

        replay(skeleton, receipt.structure["steps"])

    @staticmethod
    def examples(anatomy: Anatomy) -> tuple[Step, ...]:
        """Steps that the conformance suite tries."""
        steps = [
            Step(rewrite="slicegpt", sites=(c.id,), options={"width": {c.id: c.width * 3 // 4}})
            for c in anatomy.of_kind(Kind.CHANNEL)
        ]
        return tuple(s for s in steps if not SliceGpt().check(s, anatomy))


def _gone(step: Step, anatomy: Anatomy) -> list[int]:
    """The axes that go: the last ones."""
    (name,) = step.sites
    return list(range(step.options["width"][name], anatomy.site(name).width))


def _twins(anatomy: Anatomy) -> list[tuple[str, nn.Parameter]]:
    """Further names of parameters that write to the stream, with what they hold."""
    model = anatomy.model
    writes = {t.param for t in anatomy.stream(anatomy.stacks[0]).writes}
    ids = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if n in writes}
    return [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if id(p) in ids and n not in writes]


def _untied(anatomy: Anatomy, width: int) -> Cost:
    """What a head takes that gets weights of its own."""
    dense = anatomy.stacks[0].width
    sizes = [(p.numel() // dense * width, p.element_size()) for _, p in _twins(anatomy)]
    return Cost(sum(n for n, _ in sizes), sum(n * size for n, size in sizes))


def _apart(cut: dict[str, Any], untied: tuple[str, ...], model: nn.Module) -> list[dict[str, Any]]:
    """Cuts of the same weights under two names as cuts of each; the step before in which the config says so."""
    if not untied:
        return []
    for name, others in cut.pop("tied", {}).items():
        cut["cuts"] |= dict.fromkeys(others, cut["cuts"][name])
    config = getattr(model, "config", None)
    fields = {TIE: (True, False)} if getattr(config, TIE, False) is True else {}
    return [{"format": 1, "kind": "narrow", "cuts": {}, "untied": list(untied), "config": fields}]


@planner(
    "slicegpt",
    PAPER,
    on=Kind.CHANNEL,
    deviations=("the width is the largest within the budget; the paper's is a share, down to a multiple of 8",),
)
@dataclass(frozen=True, kw_only=True)
class SliceGptPlan:
    """The largest width of the stream within the budget, a multiple of `multiple`."""

    card: ClassVar[Card]
    known_failures: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (*FAILS, "check_something_is_left", "check_planner_leaves_the_model_untouched"),
        f"{NARROWS}, of networks with RMSNorms",
    )

    multiple: int = 8

    def __post_init__(self) -> None:
        Shape(multiple=self.multiple)

    def plan(
        self, scores: Scores | None, budget: Budget, anatomy: Anatomy, bench: Bench | None = None
    ) -> tuple[Step, ...]:
        """One step. Raises InputError where the stream can't be turned, or no width meets the budget."""
        from dataclasses import replace

        from lamina.planners._target import Target

        target = Target(budget, anatomy)
        if target.need <= 0:
            return ()
        expect_counted(budget, self.card.name)
        sites = sites_of(anatomy, (Kind.CHANNEL,), target)
        if not sites:
            raise InputError("the stream's channels can't be cut", hint="protect nothing, or take another recipe")
        problems = SliceGpt().check(_step(sites[0].id, sites[0].width - 1), anatomy)
        if problems:
            raise InputError(f"the stream can't be turned: {problems[0].what}", hint="take the recipe minitron")
        (site,), whole = sites, getattr(anatomy.total(), budget.metric)
        grain = Shape(multiple=self.multiple).step(anatomy, site)
        freed = 0
        for width in range(site.width - grain, 0, -grain):
            step = _step(site.id, width)
            freed = max(freed, whole - getattr(SliceGpt().forecast(step, anatomy), budget.metric))
            if freed >= target.need:
                return (replace(step, why={"keeps": width / site.width}),)
        raise target.refuse(freed)


def _step(site: str, width: int) -> Step:
    return Step(rewrite="slicegpt", sites=(site,), options={"width": {site: width}})


recipe(
    "slicegpt",
    PAPER,
    summary="The stream turned to its principal axes, and the last of them cut off.",
    measure="",
    planner="slicegpt",
    rewrite="slicegpt",
)
