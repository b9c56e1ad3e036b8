"""Neuron paths: one neuron of every MLP, chosen so that together they carry the prediction."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lamina.core.errors import UnsupportedError
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import measure
from lamina.core.sites import Kind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from lamina.core.scores import Array, Scores
    from lamina.core.sites import Site
    from lamina.lab import Lab
    from lamina.lab.rows import Batch

PAPER = Paper(
    key="wang2025discovering",
    title="Discovering Influential Neuron Path in Vision Transformers",
    authors=(
        "Yifan Wang",
        "Yifei Liu",
        "Yingdong Shi",
        "Changming Li",
        "Anqi Pang",
        "Sibei Yang",
        "Jingyi Yu",
        "Kan Ren",
    ),
    year=2025,
    arxiv="2503.09046",
)


@measure(
    "neuron-path",
    PAPER,
    on=Kind.NEURON,
    needs=Need.GRADIENT,
    status="stable",
    deviations=(
        "the probability of what the model itself says, not of a given class",
        "of a model that predicts tokens the last position is looked at; the paper has vision transformers alone, and "
        "looks at the first",
        "a gated MLP's neurons are the products with the gate, which enter its last map",
        "the score is that of the step that chose a layer's neuron, averaged over sequences; the paper counts how "
        "often a neuron is on a path",
    ),
)
@dataclass(frozen=True, kw_only=True)
class NeuronPath:
    """Joint attribution of a neuron with the path before it: integrated gradients of the prediction's probability F.

    From the first MLP on, JAS(i) = [Σ_k (∂F/∂w_i + Σ_l ∂F/∂w_{p_l})] · (w_i + Σ_l w_{p_l}) / `steps`,
    taken at k / `steps` times the layer's neurons w and the chosen ones p_l of earlier layers, whose others stay as
    they are; the neuron with the largest JAS joins the path. The path's own part grows from layer to layer, so that
    scores compare within a layer. On `sequences` sequences of up to `length` tokens. The grid `path` has each
    sequence's neurons and, in the last column, the attribution of the whole path.
    """

    known_failures: ClassVar[Mapping[str, str]] = {
        "check_errors_are_over_sequences": "so many sequences are looked at, however many there are"
    }

    card: ClassVar[Card]

    steps: int = 20
    sequences: int = 2
    length: int = 8

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("sequences", 1), ("length", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")

    def measure(self, lab: Lab) -> Scores:
        """For each MLP a forward and a backward over `steps` copies of every sequence."""
        import torch

        from lamina.core.scores import Grid, Scores
        from lamina.lab.gradients import frozen
        from lamina.lab.prompts import singles
        from lamina.maths.moments import Mean

        sites, missing = _neurons(lab)
        if not sites:
            return Scores(measure=self.card.name, values={}, missing=missing or {"": "the model has no MLP"})
        found: list[list[Array]] = []
        rows = []
        batches = singles(lab, self.sequences, self.length)
        with frozen(lab.model), torch.enable_grad():
            for number, batch in enumerate(batches):
                run = Run(lab, batch, [lab.anatomy.tail(s) for s in sites], self.steps)
                scores, path = run.scores_and_path(lambda done: lab.progress("paths", done, len(sites) * len(batches)))
                found.append(scores)
                rows.append([*path, run.attribution(path)])
                lab.progress("paths", (number + 1) * len(sites), len(batches) * len(sites))
        grid = Grid(
            values=np.array(rows, dtype=np.float64),
            rows=tuple(f"sequence {n}" for n in range(len(rows))),
            columns=(*(s.id for s in sites), "whole path"),
        )
        values, errors = {}, {}
        for number, site in enumerate(sites):
            mean = Mean()
            mean.add([scores[number] for scores in found], np.ones(len(found)))
            values[site.id], errors[site.id] = mean.value, mean.stderr
        name = self.card.name
        return Scores(measure=name, values=values, stderr=errors, grids={"path": grid}, missing=missing)


def _neurons(lab: Lab) -> tuple[list[Site], dict[str, str]]:
    """The sites of all MLPs' neurons in depth order, and why there are none of others."""
    sites, missing = [], {}
    for sublayer in lab.anatomy.of_kind(Kind.MLP, Kind.MOE):
        site = next(iter(lab.anatomy.units(sublayer, Kind.NEURON)), None)
        name = f"{sublayer.id}.{Kind.NEURON.value}"
        if site is not None:
            sites.append(site)
        elif sublayer.kind is Kind.MLP:
            missing[name] = lab.anatomy.refused_units(sublayer).get(name, "its neurons were not found")
    return sites, missing


class Run:
    """One sequence: the neurons of every MLP at one position, and what the prediction makes of others in their place.

    `tails` are the paths of the maps whose inputs the neurons are. `clean` are the neurons [features] as they are.
    """

    def __init__(self, lab: Lab, batch: Batch, tails: list[str], steps: int) -> None:
        import torch

        from lamina.lab.lab import predicts
        from lamina.lab.objective import objective_of, output_of

        self.lab, self.batch, self.tails, self.steps = lab, batch, tails, steps
        self.last = predicts(lab.model)
        self.clean: dict[int, Tensor] = {}
        self.cut = False
        with torch.no_grad(), self._hooked([None] * len(tails)):
            result = lab.result(batch)
        if objective_of(lab.model, result).name == "output":
            raise UnsupportedError("the model gives no probabilities", where="neuron-path")
        logits = self._at_position(output_of(result))
        self.label = int(logits[0].argmax())
        self.cut = self._cuts(logits)

    def _at_position(self, out: Tensor) -> Tensor:
        """Logits [rows, classes] at the position that is looked at."""
        return out if out.ndim == 2 else out[:, -1 if self.last else 0]

    def _cuts(self, logits: Tensor) -> bool:
        """Whether all but the last position may be left out behind the last block: its logits stay the same."""
        import torch

        if not self.last or len(self.lab.anatomy.stacks) != 1:
            return False
        self.cut = True
        try:
            with torch.no_grad():
                return torch.allclose(self.logits([None] * len(self.tails), 1), logits, rtol=1e-3, atol=1e-3)
        except (RuntimeError, IndexError, TypeError):
            return False

    def logits(self, neurons: list[Tensor | None], rows: int) -> Tensor:
        """Logits [rows, classes] with these [rows, features] in the neurons' place; None leaves them as they are."""
        from lamina.lab.objective import output_of

        batch = {k: v.repeat(rows, *([1] * (v.ndim - 1))) for k, v in self.batch.items()}
        with self._hooked(neurons):
            return self._at_position(output_of(self.lab.result(batch)))

    def _hooked(self, neurons: list[Tensor | None]) -> ExitStack:
        """Inside, forwards have other neurons at the position; the first one notes them as they are."""
        held = ExitStack()
        model, place = self.lab.model, -1 if self.last else 0
        for layer, (path, given) in enumerate(zip(self.tails, neurons, strict=True)):

            def opens(_: Any, args: Any, layer: int = layer, given: Tensor | None = given) -> Any:
                rows = 1 if given is None else len(given)
                inner = args[0] if args[0].ndim == 3 else args[0].view(rows, -1, args[0].shape[-1])
                self.clean.setdefault(layer, inner[0, place].detach().clone())
                if given is None:
                    return None
                inner = inner.clone()
                inner[:, place] = given.to(inner.dtype)
                return (inner.view(args[0].shape), *args[1:])

            held.callback(model.get_submodule(path).register_forward_pre_hook(opens).remove)
        if self.cut:
            last = self.lab.anatomy.stacks[0].blocks[-1]
            held.callback(model.get_submodule(last.path).register_forward_hook(_end).remove)
        return held

    def gradients(self, neurons: list[Tensor]) -> list[Tensor]:
        """∂F/∂w [steps, features] of the first layers' neurons in turn, given as [steps, features]."""
        import torch

        from lamina.lab.rows import real

        leaves = [n.detach().clone().requires_grad_() for n in neurons]
        rest: list[Tensor | None] = [None] * (len(self.tails) - len(leaves))
        told = self.logits([*leaves, *rest], self.steps).float().softmax(-1)[:, self.label]
        self.lab.counts.backwards += self.steps * int(real(self.batch).sum()) * self.lab.depth
        return list(torch.autograd.grad(told.sum(), leaves))

    def scaled(self, layer: int, neuron: int | None) -> Tensor:
        """[steps, features]: a layer's neurons with α times one of them, or of all."""
        import torch

        clean = self.clean[layer]
        alpha = torch.arange(self.steps, device=clean.device).to(clean) / self.steps
        if neuron is None:
            return alpha.unsqueeze(1) * clean
        made = clean.repeat(self.steps, 1)
        made[:, neuron] = alpha * clean[neuron]
        return made

    def scores_and_path(self, progress: Any) -> tuple[list[Array], list[int]]:
        """JAS of every layer's neurons, float64 [features] each, and the chosen neurons."""
        scores: list[Array] = []
        path: list[int] = []
        for layer in range(len(self.tails)):
            before = [self.scaled(n, p) for n, p in enumerate(path)]
            *earlier, own = self.gradients([*before, self.scaled(layer, None)])
            along = sum(float(g[:, p].double().sum()) for g, p in zip(earlier, path, strict=True))
            size = sum(float(self.clean[n][p]) for n, p in enumerate(path))
            found = (own.double().sum(0) + along) * (self.clean[layer].double() + size) / self.steps
            scores.append(found.cpu().numpy())
            path.append(int(found.argmax()))
            progress(layer + 1)
        return scores, path

    def attribution(self, path: list[int]) -> float:
        """The joint attribution of a path, one neuron for each of the first layers, the others as they are."""
        found = self.gradients([self.scaled(n, p) for n, p in enumerate(path)])
        along = sum(float(g[:, p].double().sum()) for g, p in zip(found, path, strict=True))
        return along * sum(float(self.clean[n][p]) for n, p in enumerate(path)) / self.steps


def _end(_: Any, __: Any, out: Any) -> Any:
    """The output of a block at the last position alone."""
    from torch import Tensor
    from torch.utils._pytree import tree_map

    return tree_map(lambda t: t[:, -1:] if isinstance(t, Tensor) and t.ndim == 3 else t, out)
