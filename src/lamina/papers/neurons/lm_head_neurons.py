"""Flash Interpretability: an MLP's neurons decoded straight through the unembedding, with no text at all."""

from __future__ import annotations

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

    from lamina.anatomy import Anatomy
    from lamina.core.scores import Array, Grid, Scores
    from lamina.core.sites import Site
    from lamina.lab import Lab

PAPER = Paper(
    key="davies2025flash",
    title="Flash Interpretability: Decoding Specialised Feature Neurons in Large Language Models with the LM-Head",
    authors=("Harry J. Davies",),
    year=2025,
    arxiv="2501.02688",
)

NEURONS, TOKENS = 1536, 2048
"""How many neurons are held against how many tokens at once: 12 MB of logits."""


@measure(
    "neuron-lens",
    PAPER,
    on=Kind.NEURON,
    needs=Need.NOTHING,
    deviations=(
        "of several maps upstream the last by name is read: in Llama's MLPs the up-projection, as in the paper; "
        "the option read takes another",
        "no norm, scaling or capping of logits comes between a neuron and the unembedding; that the paper has none "
        "either is inferred",
        "the largest probability as a score of the neuron is a choice: the paper lists tokens and probabilities",
    ),
)
@dataclass(frozen=True, kw_only=True)
class NeuronLens:
    """How surely a neuron names one token: the largest probability in softmax(U w), w its row of the map upstream.

    `read`: "last" or "first" of the maps upstream, "best" of all of them, or "tail", the column that the neuron adds to
    the stream. `score`: "probability", or "cosine" of w with a row of the unembedding, which small rows do not flatten.
    `both_signs` also decodes -w. The grid `tokens` [sublayers, neurons] has the ids of the tokens named.
    """

    card: ClassVar[Card]
    known_failures: ClassVar[Mapping[str, str]] = {
        "check_measure_leaves_the_model_untouched": "a model that does not tell its unembedding is refused"
    }

    read: str = "last"
    score: str = "probability"
    both_signs: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("read", self.read, ("last", "first", "best", "tail")),
            ("score", self.score, ("probability", "cosine")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")

    def measure(self, lab: Lab) -> Scores:
        """Reads the weights, nothing else: one product of all neurons with the unembedding."""
        from lamina.core.scores import Scores

        unembedding = _Unembedding(lab.model, self.score == "cosine")
        parameters = dict(lab.model.named_parameters())
        values, tokens = {}, {}
        missing = {s.id: "the neurons of experts are no sites" for s in lab.anatomy.of_kind(Kind.MOE)}
        sublayers = lab.anatomy.of_kind(Kind.MLP)
        for done, sublayer in enumerate(sublayers):
            site = next(iter(lab.anatomy.units(sublayer, Kind.NEURON)), None)
            if site is None:
                why = lab.anatomy.refused_units(sublayer)
                missing[sublayer.id] = next(iter(why.values()), "its neurons were not found")
                continue
            found = _rows(lab.anatomy, site, parameters, self.read == "tail")
            found = [w for w in found if w.shape[1] == unembedding.width]
            if not found:
                missing[site.id] = "its neurons are not as wide as the unembedding's input"
                continue
            chosen = {"first": found[:1], "last": found[-1:]}.get(self.read, found)
            values[site.id], tokens[site.id] = self._named(chosen, unembedding)
            lab.progress("decoding neurons", done + 1, len(sublayers))
        grids = {"tokens": _grid(tokens)} if tokens else {}
        return Scores(measure=self.card.name, values=values, grids=grids, missing=missing)

    def _named(self, readings: list[Tensor], unembedding: _Unembedding) -> tuple[Array, Array]:
        """Score and token of each neuron, float64 [neurons] each: of its readings, the one with the largest score."""
        pieces = []
        for start in range(0, len(readings[0]), NEURONS):
            here = [w[start : start + NEURONS].float() for w in readings]
            here += [-w for w in here] if self.both_signs else []
            found = np.array([unembedding.named(w) for w in here])
            best = found[:, 0].argmax(0)
            pieces.append(found[best, :, np.arange(len(best))])
        scores, tokens = np.concatenate(pieces).T
        return scores, tokens


class _Unembedding:
    """What turns the last stream into logits. Raises UnsupportedError for a model without."""

    def __init__(self, model: Any, cosine: bool) -> None:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        weight = getattr(head, "weight", None)
        if weight is None or weight.ndim != 2:
            raise UnsupportedError(
                "the model has no unembedding that could name tokens", hint="load it with its language-model head"
            )
        self.weight: Tensor = weight.detach()
        self.width = self.weight.shape[1]
        bias = getattr(head, "bias", None)
        self.bias: Tensor | None = None if bias is None or cosine else bias.detach()
        self.cosine = cosine

    def named(self, rows: Tensor) -> Array:
        """Of float32 vectors [neurons, features] the score, and the token that has it: float64 [2, neurons]."""
        import torch

        if self.cosine:
            rows = torch.nn.functional.normalize(rows, dim=-1)
        best = torch.full((len(rows),), -torch.inf, device=rows.device)
        total, token = best.double(), torch.zeros(len(rows), dtype=torch.long, device=rows.device)
        for start in range(0, len(self.weight), TOKENS):
            some = self.weight[start : start + TOKENS].float()
            some = torch.nn.functional.normalize(some, dim=-1) if self.cosine else some
            logits = rows @ some.T
            if self.bias is not None:
                logits += self.bias[start : start + TOKENS].float()
            here, place = logits.max(-1)
            token = torch.where(here > best, place + start, token)
            best = torch.maximum(best, here)
            if not self.cosine:
                total = torch.logaddexp(total, torch.logsumexp(logits, -1).double())
        scores = best.double() if self.cosine else (best.double() - total).exp()
        return torch.stack([scores, token.double()]).cpu().numpy()


def _rows(anatomy: Anatomy, site: Site, parameters: Mapping[str, Tensor], tail: bool) -> list[Tensor]:
    """The vectors [neurons, features] that neurons read the stream with, or write to it: one per map and row."""
    found = []
    for tie in anatomy.ties(site):
        parameter = parameters[tie.param].detach()
        if parameter.ndim == 2 and (tie.param.rpartition(".")[0] == anatomy.tail(site)) == tail:
            own = parameter.movedim(tie.dim, 0)[tie.start : tie.start + tie.size * site.width]
            found += list(own.unflatten(0, (site.width, tie.size)).unbind(1))
    return found


def _grid(tokens: Mapping[str, Array]) -> Grid:
    """Token ids [sublayers, neurons]; NaN behind the last neuron of a narrower one."""
    from lamina.core.scores import Grid

    width = max(map(len, tokens.values()))
    table = np.full((len(tokens), width), np.nan)
    for row, found in zip(table, tokens.values(), strict=True):
        row[: len(found)] = found
    return Grid(values=table, rows=tuple(tokens), columns=tuple(map(str, range(width))))
