"""How a survey is made: shared passes over parts of the text, kept as they are done, and merged."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.core.documents import plain
from lamina.core.errors import InputError, LaminaError, UnsupportedError
from lamina.core.files import fingerprint, read_data, sweep, to_json, write_text
from lamina.core.papers import Need
from lamina.core.scores import Scores

if TYPE_CHECKING:
    from lamina.lab import Lab
    from lamina.pipeline.run import Run


COMPARED = 4
"""Shards of a survey that compares texts, where the user names no number."""


@dataclass(frozen=True)
class How:
    """How the work of a survey is shared out; the scores do not depend on it.

    `shards`: parts of the text, each kept when it is done, so that a killed survey goes on behind it; `ray`: where Ray
    runs ("auto" begins a local cluster), which then works on the shards at once; `scratch`: a folder for the states of
    a model that is streamed from disk; `compare`: also find out how much the scores depend on the text and on the
    seed, from the shards and from one more seed.
    """

    shards: int = 1
    ray: str | None = None
    scratch: Path | None = None
    compare: bool = False

    def __post_init__(self) -> None:
        if self.shards < 1:
            raise InputError(f"a survey has at least one shard, not {self.shards}", where="--shards")


@dataclass(frozen=True)
class Made:
    """What a survey found: every measure's scores; and by (variation, part) the scores on other texts and seeds."""

    scores: list[Scores]
    parts: Mapping[tuple[str, int], list[Scores]]


class Desk:
    """A survey's work in a run folder: what is done of it is kept in `.state/survey` and not done again."""

    def __init__(self, run: Run, lab: Lab, measures: Mapping[str, Any], options: Mapping[str, Any], how: How) -> None:
        self.run, self.lab, self.measures, self.options, self.how = run, lab, measures, options, how
        self.folder = run.state / "survey"
        sweep(self.folder)

    def mark(self, name: str) -> str:
        """What one measure's scores depend on."""
        run = self.run
        told = [run.loaded.fingerprint, run.tokens.fingerprint, run.recipe.dtype, run.recipe.seed]
        return fingerprint(*told, name, plain(self.options[name]))[7:23]

    def make(self) -> Made:
        """All scores: those that are kept, and the rest."""
        for name in self.measures:
            self.run.log(f"survey: {name}{' is kept' if self._kept(name) else ''}")
        shared, alone = self._sorted([n for n in self.measures if not self._whole(n)])
        if shared:
            self._score_shared(shared)
        for name in alone:
            self._score_alone(name)
        shutil.rmtree(self.folder / "parts", ignore_errors=True)
        tables = {n: self._kept(n) or [] for n in self.measures}
        texts = {("text", i): [t[i + 1] for t in tables.values() if len(t) > i + 1] for i in range(self.how.shards)}
        seeds = self._seeds() if self.how.compare else {}
        return Made([t[0] for t in tables.values()], {**(texts if self.how.compare else {}), **seeds})

    def _whole(self, name: str) -> bool:
        """Whether all that is asked of a measure is kept."""
        kept = self._kept(name)
        if not kept:
            return False
        return not self._compared(name) or len(kept) > self.how.shards or "" in kept[0].missing

    def _compared(self, name: str) -> bool:
        """Whether a measure is to be tried on each part of the text; one of weights alone says the same of all."""
        return self.how.compare and self.measures[name].card.needs > Need.NOTHING

    def _score_shared(self, names: Sequence[str]) -> None:
        found = self._shared(names)
        parts = shards(self.lab, self.how.shards)
        for name in names:
            each = [f[name] for f in found]
            tables = [self._scored(self.lab, name, each)]
            if self.how.compare:
                tables += [self._scored(p, name, [t]) for p, t in zip(parts, each, strict=True)]
            self._keep(name, tables)

    def _score_alone(self, name: str) -> None:
        self.run.say(f"surveying by {name}")
        labs = [self.lab, *(shards(self.lab, self.how.shards) if self._compared(name) else ())]
        self._keep(name, [self._alone(name, lab) for lab in labs])

    def _seeds(self) -> dict[tuple[str, int], list[Scores]]:
        """The scores under the survey's seed and under one more, of measures that draw anything."""
        from lamina.lab.passes import finished, own, shares, tallied

        drawing = [n for n, m in self.measures.items() if any(o == "seed" for o, _, _ in m.card.options)]
        if not drawing or self.run.streamed:
            return {}
        other = self.lab.on(self.lab.batches)
        other.seed = self.lab.seed + 1
        shared = {n: self.measures[n] for n in drawing if shares(self.measures[n])}
        tallies = tallied(other, shared) if shared else {}
        again = [finished(other, m, tallies[n]) for n, m in shared.items()]
        again += [own(other, self.measures[n]) for n in drawing if n not in shared]
        first = [t[0] for n in (*shared, *(n for n in drawing if n not in shared)) if (t := self._kept(n))]
        return {("seed", 0): first, ("seed", 1): again}

    def _sorted(self, names: Sequence[str]) -> tuple[list[str], list[str]]:
        from lamina.lab.passes import shares

        shared = [n for n in names if shares(self.measures[n])]
        if self.run.streamed:
            shared = [n for n in shared if self.measures[n].card.needs is Need.FORWARD]
        return shared, [n for n in names if n not in shared]

    def _alone(self, name: str, lab: Lab) -> Scores:
        from lamina.lab.passes import own

        measure = self.measures[name]
        if self.run.streamed and measure.card.needs > Need.NOTHING:
            return Scores.none(name, "it needs more than one pass, and the model is read block by block from disk")
        return own(lab, measure)

    def _scored(self, lab: Lab, name: str, tallies: Sequence[Any]) -> Scores:
        from lamina.lab.passes import finished, merged

        return finished(lab, self.measures[name], merged(tallies))

    # Shards of the text.

    def _shared(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """The tallies of every shard: those that are kept, and the rest."""
        labs = shards(self.lab, self.how.shards)
        found: dict[int, dict[str, Any]] = {
            i: f for i in range(len(labs)) if (f := self._part(i, len(labs), names)) is not None
        }
        todo = [i for i in range(len(labs)) if i not in found]
        if self.how.ray is not None:
            from lamina.pipeline.cluster import tallied_on_ray

            for i, tallies in tallied_on_ray(self.run, labs, todo, {n: self.options[n] for n in names}, self.how.ray):
                found[i] = self._keep_part(i, len(labs), tallies)
        else:
            for i in todo:
                found[i] = self._keep_part(i, len(labs), self._tallied(labs[i], names))
        lost = [i for i in range(len(labs)) if i not in found]
        if lost:
            raise LaminaError(f"shard {lost[0] + 1} of {len(labs)} is lost", hint="survey again: the others are kept")
        return [found[i] for i in range(len(labs))]

    def _tallied(self, lab: Lab, names: Sequence[str]) -> dict[str, Any]:
        from lamina.lab.passes import tallied

        measures = {n: self.measures[n] for n in names}
        if self.run.streamed:
            from lamina.lab.disk import streamed

            return tallied(lab, measures, partial(streamed, scratch=self.how.scratch))
        return tallied(lab, measures)

    def _place(self, part: int, of: int, name: str) -> Path:
        return self.folder / "parts" / f"{part}-of-{of}" / f"{name}-{self.mark(name)}"

    def _part(self, part: int, of: int, names: Sequence[str]) -> dict[str, Any] | None:
        """A shard's tallies, if all of them are kept."""
        from lamina.lab.freeze import load_tally

        if of == 1 or not all(self._place(part, of, n).is_dir() for n in names):
            return None
        found: dict[str, Any] = {}
        for name in names:
            place = self._place(part, of, name)
            refusal = place / "refused.json"
            if refusal.is_file():
                found[name] = UnsupportedError(read_data(refusal)["why"])
            else:
                found[name] = load_tally(self.measures[name].tally(self.lab.anatomy), place)
        return found

    def _keep_part(self, part: int, of: int, tallies: dict[str, Any]) -> dict[str, Any]:
        from lamina.lab.freeze import save_tally

        for name, tally in tallies.items() if of > 1 else ():
            place = self._place(part, of, name)
            if isinstance(tally, UnsupportedError):
                write_text(place / "refused.json", to_json({"why": str(tally)}))
            else:
                save_tally(tally, place)
        return tallies

    # What is kept of whole measures.

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}-{self.mark(name)}.json"

    def _kept(self, name: str) -> list[Scores] | None:
        """A measure's scores, then those of each part of the text, where these were asked for."""
        path = self._file(name)
        if not path.is_file():
            return None
        try:
            return [Scores.from_data(d) for d in read_data(path)]
        except (InputError, KeyError, TypeError, ValueError):
            return None

    def _keep(self, name: str, tables: Sequence[Scores]) -> None:
        write_text(self._file(name), to_json([t.to_data() for t in tables]))


def shards(lab: Lab, count: int) -> list[Lab]:
    """The lab's text in so many parts of consecutive sequences, as even as can be; one per sequence at most."""
    if count == 1:
        return [lab]
    size = max(len(b[next(iter(b))]) for b in lab.batches)
    rows = [{k: v[i : i + 1] for k, v in b.items()} for b in lab.batches for i in range(len(b[next(iter(b))]))]
    count = min(count, len(rows))
    edges = [len(rows) * i // count for i in range(count + 1)]
    return [lab.on(_batched(rows[low:high], size), offset=lab.offset + low) for low, high in itertools.pairwise(edges)]


def _batched(rows: Sequence[Mapping[str, Any]], size: int) -> list[dict[str, Any]]:
    """Rows in batches of a size; rows of unlike lengths are not put together."""
    import torch

    found: list[list[Mapping[str, Any]]] = []
    for row in rows:
        alike = bool(found) and all(found[-1][0][k].shape == v.shape for k, v in row.items())
        if alike and len(found[-1]) < size:
            found[-1].append(row)
        else:
            found.append([row])
    return [{k: torch.cat([r[k] for r in group]) for k in group[0]} for group in found]
