"""Plans on trial: options written into the model as they would be applied, and taken out again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lamina.core.registry import REWRITES, rewrite_of

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.core.documents import Step
    from lamina.core.menu import Option
    from lamina.lab import Lab
    from lamina.lab.moments import InputMoments


ROOM = 2**30
"""Bytes of sums of inputs that are gathered for options that may be tried later."""
WORD = 8
"""Bytes of a number of them."""


def parted(lab: Lab, sequences: int, length: int) -> tuple[Lab, Lab]:
    """The text that maps are fitted on, and the last quarter of it, on which options are judged."""
    cut = max(1, len(lab.batches) * 3 // 4) if len(lab.batches) > 1 else 1
    fitting, judged = lab.on(lab.batches[:cut]), lab.on(lab.batches[cut:] or lab.batches)
    fitting.counts = judged.counts = lab.counts
    return fitting, judged.part(sequences, length)


class Trials:
    """Sets of options on trial: their maps written into the model, what they drop silenced; then all is as before.

    Maps are made when they are first asked for, those that need it with one forward over the text for `fitting`.
    Of a sublayer that gets narrower and of fewer bits the last map is tried as the narrower one, not rounded.
    """

    def __init__(self, fitting: Lab, judged: Lab, seen: InputMoments | None = None) -> None:
        self.fitting, self.lab, self.seen = fitting, judged, seen
        self._dense: float | None = None
        self._ahead: list[str] = []
        self._made: dict[tuple[tuple[str, ...], str], Mapping[str, Tensor]] = {}

    def expect(self, options: Iterable[Option]) -> None:
        """What may be tried: its inputs are seen in the same forward as those of a plan with half of it, if they find
        `ROOM`.
        """
        maps = self._fitted_maps(options)
        size = sum(self.lab.anatomy.weight(m).shape[1] ** 2 * WORD for m in maps)
        self._ahead = maps if size <= ROOM else []

    @contextmanager
    def on(self, options: Sequence[Option]) -> Iterator[None]:
        """Inside, the model has these options."""
        from lamina.lab.pricing import written

        self._prepare(options)
        weights: dict[str, Tensor] = {}
        for option in options:
            weights |= self._weights(option)
        with ExitStack() as held:
            held.enter_context(written(self.lab.model, weights))
            held.enter_context(self.lab.ablate(_gone(options)))
            yield

    def rise(self, options: Sequence[Option]) -> float:
        """The true rise of the loss on the judged text, in nats; one forward over it."""
        if self._dense is None:
            self._dense = self.lab.loss()
        with self.on(options):
            return self.lab.loss() - self._dense

    def _weights(self, option: Option) -> Mapping[str, Tensor]:
        key = option.groups, option.name
        if key not in self._made:
            found: dict[str, Tensor] = {}
            for step in (s for s in option.steps if s.rewrite != "drop"):
                made = rewrite_of(step).weights(step, self.lab.anatomy, self.seen)
                found = {**{p: w.to(self._dtype(p)) for p, w in made.items()}, **found}
            self._made[key] = found
        return self._made[key]

    def _dtype(self, path: str) -> Any:
        module: Any = self.lab.model.get_submodule(path)
        return module.weight.dtype

    def _prepare(self, options: Sequence[Option]) -> None:
        """Look at what enters the maps of options that were not tried before."""
        maps = self._fitted_maps(o for o in options if (o.groups, o.name) not in self._made)
        if any(self._unseen(m) for m in maps):
            from lamina.lab.moments import input_moments

            ahead = self._ahead if 2 * len(maps) >= len(self._ahead) else []
            found = input_moments(self.fitting, [m for m in dict.fromkeys((*maps, *ahead)) if self._unseen(m)])
            self.seen = found if self.seen is None else self.seen.merge(found)

    def _unseen(self, site: str) -> bool:
        return self.seen is None or not self.seen.knows(site)

    def _fitted_maps(self, options: Iterable[Option]) -> list[str]:
        """The maps of the sublayers of options that depend on the text."""
        anatomy = self.lab.anatomy
        sites = dict.fromkeys(g for o in options if any(_fitted(s) for s in o.steps) for g in o.groups)
        return [x.id for s in sites for x in anatomy.linears(s)]


def _gone(options: Sequence[Option]) -> list[str]:
    return [s for o in options for step in o.steps if step.rewrite == "drop" for s in step.sites]


def _fitted(step: Step) -> bool:
    """Whether a step's maps depend on the text."""
    from lamina.core.papers import Need

    return REWRITES.card(step.rewrite).needs >= Need.FORWARD


class Healed(Trials):
    """Trials of what is left after `steps` of healing: drops, narrower sublayers and lower ranks heal, bits do not.

    A rise is that of a healed copy with all but the steps that keep shapes, and what these add to it unhealed.
    """

    def __init__(self, fitting: Lab, judged: Lab, steps: int, healer: str = "lora") -> None:
        super().__init__(fitting, judged)
        self.steps, self.healer = steps, healer

    def rise(self, options: Sequence[Option]) -> float:
        """The true rise of the loss on the judged text, in nats, after a few steps of healing."""
        shaped = [replace(o, steps=tuple(s for s in o.steps if not kept_shapes(s))) for o in options]
        shaped = [replace(o, name=f"{o.name}, healed") for o in shaped if o.steps]
        unhealed = super().rise(options)
        if not shaped:
            return unhealed
        return self._healed(shaped) + unhealed - super().rise(shaped)

    def _healed(self, options: Sequence[Option]) -> float:
        import copy

        from lamina.core.registry import HEALERS
        from lamina.lab import Lab as Other
        from lamina.lab.order import merged

        model = copy.deepcopy(self.lab.model)
        bench = Other(model, self.fitting.batches, seed=self.fitting.seed)
        for step in merged([s for o in options for s in o.steps], bench):
            rewrite_of(step).apply(step, bench)
        HEALERS.make(self.healer).heal(bench, teacher=self.lab.model, steps=self.steps)
        assert self._dense is not None
        return Other(model, self.lab.batches, anatomy=bench.anatomy).loss() - self._dense


def kept_shapes(step: Step) -> bool:
    """Whether a step changes numbers alone, and not what is computed: such rewrites come at a later stage."""
    return bool(getattr(REWRITES.method(step.rewrite), "stage", 0))
