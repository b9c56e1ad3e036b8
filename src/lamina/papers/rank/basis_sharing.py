"""Basis Sharing: maps of neighbouring blocks are made of the same few directions, each by numbers of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lamina.core.documents import Receipt, Step
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import rewrite
from lamina.core.sites import Cost, Kind
from lamina.rewrites._maps import linear_problems, number_for, shape_of
from lamina.rewrites.drop import Problem
from lamina.rewrites.factorise import factors_of, fill

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lamina.anatomy import Anatomy
    from lamina.lab import Lab
    from lamina.lab.moments import InputMoments

PAPER = Paper(
    key="wang2024basis",
    title="Basis Sharing: Cross-Layer Parameter Sharing for Large Language Model Compression",
    authors=("Jingcun Wang", "Yu-Guang Chen", "Ing-Chao Lin", "Bing Li", "Grace Li Zhang"),
    year=2024,
    arxiv="2410.03765",
)


@rewrite(
    "basis-sharing",
    PAPER,
    on=Kind.LINEAR,
    needs=Need.FORWARD,
    deviations=(
        "S comes from the moment's eigenvectors and not from a Cholesky factor: the same product, and no jitter",
        "coefficients are fitted anew (refit) on the dense network's inputs: the code does so on those of the cut one",
        "neighbours whose maps differ in shape or type share nothing",
    ),
)
@dataclass(frozen=True, kw_only=True)
class BasisSharing:
    """Let maps of `size` neighbouring blocks share a basis: W_t ≈ B_t A, the basis A [rank, inputs] stored once.

    A and all B_t [outputs, rank] are the best of that rank for the stacked maps: least ‖([W_1; …] - [B_1; …] A) S‖,
    S Sᵀ the sum of the inputs' moments. Maps with the same name inside blocks that follow each other go together; the
    last map of a sublayer, whose inputs differ from depth to depth, keeps a basis of its own. `options["rank"]` is one
    number, or one for each site, the same in a group. With `refit` each B_t is then the best for its block's inputs.
    """

    card: ClassVar[Card]

    size: int = 2
    refit: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is at least 1, not {self.size}")

    def _groups(self, step: Step, anatomy: Anatomy) -> list[tuple[str, ...]]:
        from lamina.anatomy.neighbours import groups

        return groups(anatomy, step.sites, self.size)

    def check(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What stands in the way; needs no weights."""
        from lamina.anatomy.neighbours import tied

        problems = linear_problems(step, anatomy, "rank")
        if problems:
            return problems
        shared = tied(anatomy)
        problems = [Problem(s, "shares its weights with another map", "leave it") for s in step.sites if s in shared]
        for group in self._groups(step, anatomy):
            outputs, inputs = shape_of(anatomy, group[0])
            ranks = {number_for(step, "rank", s) for s in group}
            if len(ranks) > 1:
                told = f"{', '.join(group)} share a basis and are told ranks {', '.join(map(str, sorted(ranks)))}"
                problems.append(Problem(group[0], told, "one rank for all of them"))
                continue
            rank, whole = ranks.pop(), len(group) * outputs * inputs
            most = -(-whole // (inputs + len(group) * outputs)) - 1
            if not 1 <= rank <= most:
                what = f"rank {rank} saves nothing: it has ranks from 1 to {most}"
                problems.append(Problem(group[0], what, "keep the map, or take another rank"))
        return problems

    def forecast(self, step: Step, anatomy: Anatomy) -> Cost:
        """What the whole model will take, each basis once; equals the receipt's `after`.

        A basis is stored once and used at each depth: a rank that saves parameters may take more multiply-adds.
        """
        total = anatomy.total()
        for group in self._groups(step, anatomy):
            (outputs, inputs), count = shape_of(anatomy, group[0]), len(group)
            rank = number_for(step, "rank", group[0])
            less = count * outputs * inputs - rank * (inputs + count * outputs)
            macs = count * (outputs * inputs - rank * (inputs + outputs))
            total -= Cost(less, less * anatomy.weight(group[0]).element_size(), macs=macs)
        return total

    def apply(self, step: Step, lab: Lab) -> Receipt:
        """Put the factors in the maps' places and tie the bases.

        Raises UnsupportedError for the first problem that `check` names, before anything is changed.
        """
        for problem in self.check(step, lab.anatomy):
            raise problem.error()
        from lamina.lab.moments import input_moments

        anatomy = lab.anatomy
        before, after = anatomy.total(), self.forecast(step, anatomy)
        seen, made = input_moments(lab, step.sites), {}
        for site, path, first, second in self._made(step, anatomy, seen):
            made[site] = path, first, second
            lab.progress("factors", len(made), len(step.sites))
        biases = {path: getattr(lab.model.get_submodule(path), "bias", None) for path, _, _ in made.values()}
        receipt = Receipt(
            rewrite=self.card.name, sites=step.sites, before=before, after=after,
            options={"size": self.size, "refit": self.refit, **step.options},
            structure={"steps": self._structure(step, anatomy, biases)},
        )  # fmt: skip
        self.replay(receipt, lab.model)
        for path, first, second in made.values():
            fill(lab.model.get_submodule(path), first, second, biases[path])
        lab.renew()
        return receipt

    def _structure(self, step: Step, anatomy: Anatomy, biases: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Factors in the places of maps, then the first factors of each group as one."""
        modules: dict[str, Any] = {}
        same: list[list[str]] = []
        for group in self._groups(step, anatomy):
            for site in group:
                (outputs, inputs), path = shape_of(anatomy, site), anatomy.site(site).path
                rank = number_for(step, "rank", site)
                modules[path] = {"type": "factors", "inputs": inputs, "outputs": outputs, "rank": rank}
                modules[path] |= {"bias": True} if biases[path] is not None else {}
            same += [[f"{anatomy.site(s).path}.down.weight" for s in group]] if len(group) > 1 else []
        swap = {"format": 1, "kind": "swap", "modules": modules}
        return [swap, *([{"format": 1, "kind": "share", "groups": same}] if same else [])]

    def weights(self, step: Step, anatomy: Anatomy, seen: InputMoments | None) -> dict[str, Tensor]:
        """Path → the map as one matrix [outputs, inputs], as it would be; `seen` are the inputs' moments."""
        return {path: second @ first for path, first, second in self.factors(step, anatomy, seen).values()}

    def factors(self, step: Step, anatomy: Anatomy, seen: InputMoments | None) -> dict[str, tuple[str, Tensor, Tensor]]:
        """Site → its path, the basis [rank, inputs] and its coefficients [outputs, rank].

        Without `refit` the first r rows and columns are those of rank r.
        """
        return {site: (path, first, second) for site, path, first, second in self._made(step, anatomy, seen)}

    def _made(
        self, step: Step, anatomy: Anatomy, seen: InputMoments | None
    ) -> Iterator[tuple[str, str, Tensor, Tensor]]:
        """Site, path, basis and coefficients, group by group."""
        import torch

        from lamina.maths.whitening import whitener

        assert seen is not None
        for group in self._groups(step, anatomy):
            maps = [anatomy.weight(s).detach().double() for s in group]
            moments = [seen.of(s)[0] for s in group]
            rank = number_for(step, "rank", group[0])
            basis, stacked = factors_of(torch.cat(maps), rank, whitener(torch.stack(moments).sum(0)))
            parts = stacked.split(maps[0].shape[0])
            for site, weight, moment, part in zip(group, maps, moments, parts, strict=True):
                own = coefficients(weight, basis, moment) if self.refit else part
                yield site, anatomy.site(site).path, basis, own

    def replay(self, receipt: Receipt, skeleton: nn.Module, anatomy: Anatomy | None = None) -> None:
        """Rebuild the structure on a model of the dense class, on any device, meta included."""
        from lamina.rewrites.structure import replay

        replay(skeleton, receipt.structure["steps"])

    @staticmethod
    def examples(anatomy: Anatomy) -> tuple[Step, ...]:
        """Steps that the conformance suite tries: all maps of three blocks, and last maps with ranks of their own."""
        blocks = [[s.id for s in anatomy.linears(b.site)] for b in anatomy.stacks[0].blocks[:3]]
        mixed = {maps[-1]: 2 + n for n, maps in enumerate(blocks)}
        return (
            Step(rewrite="basis-sharing", sites=tuple(s for maps in blocks for s in maps), options={"rank": 3}),
            Step(rewrite="basis-sharing", sites=tuple(mixed), options={"rank": mixed}),
        )


def coefficients(weight: Tensor, basis: Tensor, moment: Tensor) -> Tensor:
    """B [outputs, rank] of the least ‖(W - B A) X‖, X Xᵀ the moment [inputs, inputs]; all float64."""
    import torch

    seen = basis @ moment
    return weight @ seen.T @ torch.linalg.pinv(seen @ basis.T, hermitian=True)
