"""A table of latency: what one sublayer of each shape takes in the model itself, and the vocabulary's share."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lamina.core.speeds import Of, Part
from lamina.evaluators.engines import in_turn

if TYPE_CHECKING:
    from torch import nn

    from lamina.anatomy import Anatomy
    from lamina.evaluators.engines import Cell
    from lamina.lab import Lab
    from lamina.lab.workloads import Workloads

REST = "rest"
Times = dict[str, tuple[float, float | None]]
"""Part → seconds of the prefill, and of one decoded token."""


@dataclass
class _Group:
    """Sublayers of one shape, or one part that stands alone."""

    kind: str
    like: str
    shape: str = ""
    parameters: int = 0
    sites: list[str] = field(default_factory=list[str])


def table(
    lab: Lab,
    reference: nn.Module,
    cell: Cell,
    *,
    rounds: int = 3,
    warmups: int = 1,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> tuple[Part, ...]:
    """Parts of the dense and of the thinned model, dense, thinned, thinned, dense in every round.

    Medians over sublayers of one shape and over all runs. Each module is timed inside the running model, its own norms
    with it; what is left is the rest: norms of the stream, additions, the cache, Python. The parts of one model make up
    its time.
    """
    from lamina.anatomy import Anatomy
    from lamina.lab.workloads import Workloads

    bench = Workloads(lab, cell.batch)
    models = {"dense": (reference, Anatomy.of(reference)), "thinned": (lab.model, lab.anatomy)}
    runs: dict[str, list[Times]] = {who: [] for who in models}
    for number in range(-warmups, rounds):
        taken = in_turn(lambda who: _times(bench, *models[who], cell))
        if number >= 0:
            for who, found in taken.items():
                runs[who] += found
        progress("speed: sublayers", max(number + 1, 0), rounds)
    whose: tuple[tuple[Of, Any], ...] = (("dense", models["dense"]), ("thinned", models["thinned"]))
    return tuple(part for of, pair in whose for part in _parts(of, *pair, runs[of]))


def _times(bench: Workloads, model: nn.Module, anatomy: Anatomy, cell: Cell) -> Times:
    """One answer, with every sublayer and the vocabulary timed in it."""
    from lamina.lab.workloads import modules_of, timed, vocabulary_of

    paths = {s.id: modules_of(anatomy, [s.id]) for s in anatomy.sublayers}
    paths |= {name: (path,) for name, path in vocabulary_of(model).items()}
    with ExitStack() as held:
        spans = {
            name: [held.enter_context(timed(model, [path], bench.device)) for path in row]
            for name, row in paths.items()
        }
        read, made = bench.answer(model, bench.ids(cell.length), cell.decode)
    steps = cell.decode if made is not None else 0
    found: Times = {}
    for name, rows in spans.items():
        first = sum(sum(calls[: len(calls) - steps]) for calls in rows)
        later = sum(sum(calls[len(calls) - steps :]) for calls in rows) / steps if steps else None
        found[name] = (first, later)
    left = None if made is None else made / steps - sum(later or 0.0 for _, later in found.values())
    found[REST] = (read - sum(first for first, _ in found.values()), left)
    return found


def _parts(of: Of, model: nn.Module, anatomy: Anatomy, runs: Sequence[Times]) -> list[Part]:
    whole = [[sum(run[name][n] or 0.0 for name in run) for run in runs] for n in (0, 1)]

    def share(group: _Group, n: int) -> float | None:
        pairs = zip(runs, whole[n], strict=True)
        shares = [sum(run[s][n] or 0.0 for s in group.sites) / total for run, total in pairs if total]
        return statistics.median(shares) if shares else None

    def seconds(group: _Group, n: int) -> float | None:
        taken = [t for run in runs for s in group.sites if (t := run[s][n]) is not None]
        return statistics.median(taken) if taken else None

    return [
        Part(
            of=of, kind=group.kind, like=group.like, shape=group.shape, count=len(group.sites),
            parameters=group.parameters, prefill=seconds(group, 0) or 0.0, prefill_share=share(group, 0) or 0.0,
            decode=seconds(group, 1), decode_share=share(group, 1),
        )
        for group in (*_groups(anatomy), *_vocabulary(model), _Group(REST, "", sites=[REST]))
    ]  # fmt: skip


def _groups(anatomy: Anatomy) -> list[_Group]:
    """The sublayers by kind, shapes of their maps and class of what computes them."""
    found: dict[Any, _Group] = {}
    for site in anatomy.sublayers:
        maps = [tuple(anatomy.weight(linear).shape) for linear in anatomy.linears(site)]
        core = type(anatomy.model.get_submodule(f"{anatomy.block(site).path}.{anatomy.branch(site).core}")).__name__
        key = (site.kind, tuple(maps), core)
        if key not in found:
            shape = " ".join("×".join(map(str, m)) for m in maps)
            found[key] = _Group(site.kind.value, site.id, shape, anatomy.cost(site).parameters)
        found[key].sites.append(site.id)
    return list(found.values())


def _vocabulary(model: nn.Module) -> list[_Group]:
    from lamina.lab.workloads import vocabulary_of

    found: list[_Group] = []
    for name, path in vocabulary_of(model).items():
        weight = getattr(model.get_submodule(path), "weight", None)
        shape = "" if weight is None else "×".join(map(str, weight.shape))
        found.append(_Group(name, path, shape, 0 if weight is None else weight.numel(), [name]))
    return found
