"""Narrow: units leave a sublayer (heads, KV groups, neurons), and what stays may learn what they added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lamina.core.documents import Receipt, Step
from lamina.core.errors import LaminaError, UnsupportedError
from lamina.core.papers import Card, Need
from lamina.core.registry import rewrite
from lamina.core.sites import Cost, Kind
from lamina.rewrites.drop import Problem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lamina.anatomy import Anatomy
    from lamina.core.sites import Site
    from lamina.lab import Lab
    from lamina.lab.moments import InputMoments

KINDS = (Kind.HEAD, Kind.KV_GROUP, Kind.NEURON)


@rewrite("narrow", on=KINDS, needs=Need.FORWARD, status="stable")
@dataclass(frozen=True, kw_only=True)
class Narrow:
    """Cut the units `options["gone"]` (site → numbers of its units) out of their sublayers, shapes and all.

    With `refit` r > 0 the columns that stay of the last map W take over what those that go added, by ridge regression
    on the lab's text: W_k += W_g C_gk (C_kk + r · mean(diag C_kk))⁻¹, C = Σ z zᵀ of the map's inputs z: one forward.
    """

    card: ClassVar[Card]
    each: ClassVar[tuple[str, ...]] = ("gone",)

    refit: float = 0.0

    def __post_init__(self) -> None:
        if self.refit < 0:
            raise ValueError(f"refit is at least 0, not {self.refit:g}")

    def check(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What stands in the way; needs no weights."""
        given = step.options.get("gone")
        if not step.sites or not isinstance(given, Mapping):
            return [Problem("narrow", "the step names no units", "options: {gone: {site: [numbers]}}")]
        problems = []
        for name in step.sites:
            try:
                site = anatomy.site(name)
            except LaminaError:
                problems.append(Problem(name, "the model has no such units"))
                continue
            problems += _problems(anatomy, site, given.get(name, ()))
        return problems

    def forecast(self, step: Step, anatomy: Anatomy) -> Cost:
        """What the whole model will take; equals the receipt's `after`."""
        total = anatomy.total()
        for name in step.sites:
            site = anatomy.site(name)
            total -= _freed(anatomy, site, len(gone_of(step, name)))
        return total

    def apply(self, step: Step, lab: Lab) -> Receipt:
        """Cut the units from `lab.model`. Raises UnsupportedError for the first problem, before anything is changed."""
        for problem in self.check(step, lab.anatomy):
            raise problem.error()
        anatomy = lab.anatomy
        before, after = anatomy.total(), self.forecast(step, anatomy)
        sites = [anatomy.site(s) for s in step.sites]
        steps = [{"format": 1, "kind": "narrow", **anatomy.without_units(s, gone_of(step, s.id))} for s in sites]
        widths = {s.width: s.width - len(gone_of(step, s.id)) for s in sites}
        if len(sites) > 1 and (said := _said_by_config(anatomy, widths, steps)):
            steps.append(said)
        changes = self._refitted(step, lab, sites)
        receipt = Receipt(
            rewrite=self.card.name, sites=step.sites, before=before, after=after, options=step.options,
            structure={"steps": steps},
        )  # fmt: skip
        for path, weight in changes.items():
            write(lab.model.get_submodule(path), weight)
        self.replay(receipt, lab.model)
        lab.renew()
        return receipt

    def _refitted(self, step: Step, lab: Lab, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Path → weights [outputs, inputs] of the last maps, before the cut."""
        if not self.refit:
            return {}
        from lamina.lab.moments import input_moments

        return self._taken_over(step, lab.anatomy, input_moments(lab, tails_of(lab.anatomy, sites).values()))

    def _taken_over(self, step: Step, anatomy: Anatomy, seen: InputMoments) -> dict[str, Tensor]:
        sites = [anatomy.site(s) for s in step.sites]
        tails = tails_of(anatomy, sites)
        found: dict[str, Tensor] = {}
        for site in (s for s in sites if s.id in tails):
            columns = columns_of(anatomy, site, gone_of(step, site.id))
            path = anatomy.tail(site)
            weight = found.get(path, anatomy.weight(tails[site.id]).detach().double())
            found[path] = taken_over(weight, seen.of(tails[site.id])[0], columns, self.refit)
        return found

    def weights(self, step: Step, anatomy: Anatomy, seen: InputMoments | None) -> dict[str, Tensor]:
        """Path → the last map as it would be, in its present shape: the columns of what goes are zero."""
        sites = [anatomy.site(s) for s in step.sites]
        tails = tails_of(anatomy, sites)
        found = self._taken_over(step, anatomy, seen) if self.refit and seen is not None else {}
        for site in (s for s in sites if s.id in tails):
            path = anatomy.tail(site)
            weight = found.setdefault(path, anatomy.weight(tails[site.id]).detach().clone())
            weight[:, columns_of(anatomy, site, gone_of(step, site.id))] = 0
        return found

    def replay(self, receipt: Receipt, skeleton: nn.Module, anatomy: Anatomy | None = None) -> None:
        """Rebuild the structure on a model of the dense class, on any device, meta included."""
        from lamina.rewrites.structure import replay

        replay(skeleton, receipt.structure["steps"])

    @staticmethod
    def examples(anatomy: Anatomy) -> tuple[Step, ...]:
        """Steps that the conformance suite tries: some neurons of two MLPs, a KV group of one attention."""
        steps = []
        for kind, count in ((Kind.NEURON, 3), (Kind.KV_GROUP, 1)):
            sites = [s for s in anatomy.of_kind(kind) if s.width > count and _cuttable(anatomy, s)][1:3]
            gone = {s.id: list(range(n, n + count)) for n, s in enumerate(sites)}
            steps += [Step(rewrite="narrow", sites=tuple(gone), options={"gone": gone})] if gone else []
        return tuple(steps)


def tails_of(anatomy: Anatomy, sites: Sequence[Site]) -> dict[str, str]:
    """Site of units → the linear map whose inputs they are, where it is one that sees every token."""
    homes = {s.path: s.id for s in anatomy.linears()}
    return {s.id: homes[anatomy.tail(s)] for s in sites if anatomy.tail(s) in homes}


def columns_of(anatomy: Anatomy, site: Site, units: Sequence[int]) -> list[int]:
    """The columns of the last map that some units own."""
    columns = anatomy.columns(site)
    return [c for n in units for c in columns[n]]


def gone_of(step: Step, site: str) -> list[int]:
    """The units of one site that go, in order."""
    return sorted(set(step.options["gone"][site]))


def _cuttable(anatomy: Anatomy, site: Site) -> bool:
    try:
        anatomy.without_units(site, [0])
    except UnsupportedError:
        return False
    return True


def _problems(anatomy: Anatomy, site: Site, gone: Sequence[int]) -> list[Problem]:
    """Of one site: units that it does not have, all of them, and heads that leave KV heads with unequal shares."""
    if site.kind not in KINDS:
        return [Problem(site.id, "narrow cuts heads, KV groups and neurons", "name a site of units")]
    units = sorted(set(gone))
    if not units:
        return [Problem(site.id, "no unit of it goes", "options: {gone: {site: [numbers]}}")]
    if units[0] < 0 or units[-1] >= site.width:
        return [Problem(site.id, f"it has units 0 to {site.width - 1}, not {units[-1] if units[0] >= 0 else units[0]}")]
    if len(units) == site.width:
        return [Problem(site.id, "none of its units would be left", "drop the sublayer")]
    group, _ = anatomy.grouped(site)
    shares = {sum(u // group == g for u in units) for g in range(site.width // group)}
    if group > 1 and len(shares) > 1:
        return [Problem(site.id, "its KV heads would serve unequal numbers of heads", "cut as many of each KV group")]
    return []


def _freed(anatomy: Anatomy, site: Site, count: int) -> Cost:
    """What cutting so many units frees; products of attention weights go in proportion."""
    each = anatomy.unit_cost(site)
    home = anatomy.branch(site.id.rpartition(".")[0]).site
    cost = anatomy.cost(home)
    if site.kind is Kind.NEURON:
        return Cost(each.parameters * count, each.bytes * count, each.macs * count)
    maps = sum(anatomy.linear_cost(s).macs for s in anatomy.linears(home))
    products = (cost.macs - maps) * count // site.width
    kv = cost.kv_bytes * count // site.width if site.kind is Kind.KV_GROUP or anatomy.grouped(site)[0] == 1 else 0
    return Cost(each.parameters * count, each.bytes * count, each.macs * count + products, kv)


def taken_over(weight: Tensor, moment: Tensor, gone: Sequence[int], ridge: float) -> Tensor:
    """W [outputs, inputs] whose columns that stay also do what those that go did, float64; gone columns are as before.

    `moment` Σ z zᵀ [inputs, inputs] of the inputs; least Σ ‖W z - W' z_k‖² + λ‖W' - W_k‖², λ `ridge` times the mean
    of the kept inputs' energies.
    """
    import torch

    out = torch.zeros(len(moment), dtype=torch.bool)
    out[list(gone)] = True
    keep = (~out).nonzero().flatten()
    left = out.nonzero().flatten()
    kept = moment[keep][:, keep]
    level = (ridge * kept.diagonal().mean()).clamp_min(1e-300)
    eye = torch.eye(len(keep), dtype=kept.dtype)
    change = torch.linalg.solve(kept + level * eye, moment[keep][:, left]) @ weight[:, left].T
    made = weight.clone()
    made[:, keep] += change.T
    return made


def write(module: Any, weight: Tensor) -> None:
    """Weights [outputs, inputs] into a linear map, as it stores them."""
    import torch

    with torch.no_grad():
        module.weight.copy_(weight if isinstance(module, torch.nn.Linear) else weight.T)


def _said_by_config(anatomy: Anatomy, widths: Mapping[int, int], steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The step that lets the model's config tell the widths, where its class then builds all these shapes; or nothing.

    `widths`: numbers of units before → after. Modules get the numbers that the class would give them.
    """
    from lamina.anatomy.config import config_of
    from lamina.anatomy.counting import twin
    from lamina.rewrites.structure import replay

    config, cut = config_of(anatomy.model), twin(anatomy.model)
    if len(widths) != 1 or cut is None or config is None or config is not getattr(anatomy.model, "config", None):
        return {}
    replay(cut, steps)
    ((before, after),) = widths.items()
    for name, value in config.to_dict().items():
        if type(value) is int and value == before:
            built = _built(anatomy.model, config, name, after)
            if built is not None and (numbers := _numbers_of(built, cut)) is not None:
                return {
                    "format": 1,
                    "kind": "narrow",
                    "cuts": {},
                    "numbers": numbers,
                    "config": {name: (before, after)},
                }
    return {}


def _built(model: nn.Module, config: Any, name: str, value: int) -> nn.Module | None:
    """What the class builds with another number in one field of the config."""
    import copy

    from lamina.anatomy.counting import twin

    tried = copy.deepcopy(config)
    setattr(tried, name, value)
    return twin(model, tried)


def _numbers_of(built: nn.Module, cut: nn.Module) -> dict[str, dict[str, int]] | None:
    """The whole numbers that modules of one have and those of the other lack; None where shapes differ."""
    from lamina.anatomy.counting import shapes

    if shapes(built) != shapes(cut):
        return None
    found: dict[str, dict[str, int]] = {}
    others = dict(cut.named_modules())
    for path, module in built.named_modules():
        mine = {k: v for k, v in vars(module).items() if type(v) is int}
        odd = {k: v for k, v in mine.items() if vars(others[path]).get(k) != v}
        found |= {path: odd} if odd else {}
    return found
