"""Narrow: units go (heads, KV groups, neurons, experts, channels), and what stays may learn what they added."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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

KINDS = (Kind.HEAD, Kind.KV_GROUP, Kind.NEURON, Kind.EXPERT, Kind.CHANNEL)
INPUTS = (Kind.HEAD, Kind.KV_GROUP, Kind.NEURON)
"""The kinds whose units are inputs of their sublayer's last map."""


@rewrite("narrow", on=KINDS, needs=Need.FORWARD, status="stable")
@dataclass(frozen=True, kw_only=True)
class Narrow:
    """Cut the units `options["gone"]` (site → numbers of its units) out of the model, shapes and all.

    Experts leave with their rows of the router; channels leave the whole stream, embeddings and norms too.
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
                problems.append(Problem(name, f"the model has no such units{_why_not(anatomy, name)}"))
                continue
            problems += _problems(anatomy, site, given.get(name, ()))
            if self.refit and site.kind not in INPUTS:
                problems.append(Problem(name, f"no last map can make up for {site.kind.value}s", "refit: 0"))
        both = {s.rpartition(".")[0] for s in step.sites if s.endswith(f".{Kind.HEAD.value}")}
        both &= {s.rpartition(".")[0] for s in step.sites if s.endswith(f".{Kind.KV_GROUP.value}")}
        return problems + [Problem(s, "heads and KV groups of it go at once", "name one of both") for s in sorted(both)]

    def forecast(self, step: Step, anatomy: Anatomy) -> Cost:
        """What the whole model will take; equals the receipt's `after`."""
        from lamina.rewrites._narrow_costs import narrowed_cost

        return narrowed_cost(anatomy, {s: gone_of(step, s) for s in step.sites})

    def apply(self, step: Step, lab: Lab) -> Receipt:
        """Cut the units from `lab.model`. Raises UnsupportedError for the first problem, before anything is changed."""
        from lamina.rewrites._narrow_config import said_by_config, told, undone_on_error, widths_of
        from lamina.rewrites.structure import replay

        for problem in self.check(step, lab.anatomy):
            raise problem.error()
        anatomy = lab.anatomy
        before, after = anatomy.total(), self.forecast(step, anatomy)
        sites = [anatomy.site(s) for s in step.sites]
        steps = [{"format": 1, "kind": "narrow", **anatomy.without_units(s, gone_of(step, s.id))} for s in sites]
        widths = widths_of(anatomy, sites, {s.id: gone_of(step, s.id) for s in sites})
        said = said_by_config(anatomy, widths, steps)
        changes = self._refitted(step, lab, sites)
        with _one_line(step), undone_on_error(lab.model, changes):
            for path, weight in changes.items():
                write(lab.model.get_submodule(path), weight)
            replay(lab.model, steps)
            steps += [said] if said and told(anatomy, said) else []
            lab.renew()
        return Receipt(
            rewrite=self.card.name, sites=step.sites, before=before, after=after, options=step.options,
            structure={"steps": steps},
        )  # fmt: skip

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
        """Steps that the conformance suite tries: neurons of two MLPs, a KV group, experts, channels and neurons."""
        found = []
        for kind, count in ((Kind.NEURON, 3), (Kind.KV_GROUP, 1), (Kind.EXPERT, 2)):
            sites = [s for s in anatomy.of_kind(kind) if s.width > count and _cuttable(anatomy, s)][1:3]
            found.append({s.id: list(range(n, n + count)) for n, s in enumerate(sites)})
        channels = [c for k in anatomy.stacks if (c := anatomy.channels(k)) and _cuttable(anatomy, c)]
        some = [s for s in anatomy.of_kind(Kind.NEURON) if _cuttable(anatomy, s)][:1]
        found += [{**{c.id: list(range(3, 11)) for c in channels}, **{s.id: [1, 2] for s in some}}] if channels else []
        return tuple(Step(rewrite="narrow", sites=tuple(g), options={"gone": g}) for g in found if g)


@contextmanager
def _one_line(step: Step) -> Iterator[None]:
    """Inside, what a model says that can't run on its narrower shapes becomes one line."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = f"the model does not run without them: {line[:160]}"
        raise UnsupportedError(what, where=step.sites[0], hint="keep multiples of 8 or more") from error


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


def _why_not(anatomy: Anatomy, name: str) -> str:
    """The reason that the anatomy gives for units that it did not find, as the rest of a line."""
    home, _, kind = name.rpartition(".")
    stack = next((k for k in anatomy.stacks if k.name == home), None)
    if kind == Kind.CHANNEL.value and stack is not None:
        reason = anatomy.refused_channels(stack)
    else:
        reason = anatomy.refused_units(home).get(name, "") if home in {s.id for s in anatomy.sublayers} else ""
    return f": {reason}" if reason else ""


def _problems(anatomy: Anatomy, site: Site, gone: Sequence[int]) -> list[Problem]:
    """Of one site: units that it does not have, all of them, and those that leave others without what they need."""
    if site.kind not in KINDS:
        return [Problem(site.id, "narrow cuts heads, KV groups, neurons, experts and channels", "name a site of units")]
    units = sorted(set(gone))
    if not units:
        return [Problem(site.id, "no unit of it goes", "options: {gone: {site: [numbers]}}")]
    if units[0] < 0 or units[-1] >= site.width:
        return [Problem(site.id, f"it has units 0 to {site.width - 1}, not {units[-1] if units[0] >= 0 else units[0]}")]
    left = site.width - len(units)
    if not left:
        return [Problem(site.id, "none of its units would be left", "drop the sublayer")]
    if site.kind is Kind.CHANNEL:
        several = len(anatomy.stacks) > 1
        return [Problem(site.id, "the channels of one stack among several can't be cut")] if several else []
    if site.kind is Kind.EXPERT and left < anatomy.active(site):
        return [Problem(site.id, f"a token goes to {anatomy.active(site)} experts, {left} would be left", "keep more")]
    group, _ = anatomy.grouped(site)
    counts = Counter(u // group for u in units)
    shares = {counts[g] for g in range(site.width // group)}
    if group > 1 and len(shares) > 1:
        return [Problem(site.id, "its KV heads would serve unequal numbers of heads", "cut as many of each KV group")]
    return []


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
