"""What the coverage run asks of one specimen, each question answered with yes, n/a, or no and the reason."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lamina.anatomy import Anatomy, Block, Stack
from lamina.anatomy.parts import Branch
from lamina.core.documents import Receipt, Step
from lamina.core.errors import LaminaError, ReloadError, UnsupportedError
from lamina.core.sites import SUBLAYERS, Site
from lamina.evaluators.reload import CHECKS, contracts
from lamina.exporters.hf import save_checkpoint
from lamina.lab.load import quiet
from lamina.rewrites.drop import Drop
from lamina.testing._coverage_reference import Outputs, expect_equal, handed_on, masked, outputs, repeats
from lamina.testing.coverage import CELLS

if TYPE_CHECKING:
    from lamina.testing.zoo import Specimen


YES, NA = "yes", "n/a"
LONGEST = 160
GENERATES = ("reload_cache", "reload_padding", "reload_generate")
CRASHED = "the fresh process"
"""How an error begins that says nothing of one checkpoint, since the process that loads all of them ended."""
STARTING, LOADING = 200.0, 30.0
"""Seconds that the fresh process may take to start, and to load one checkpoint."""
Tell = Callable[[str, str], None]
"""Takes (name of a cell or of a fact, its value)."""


@dataclass(frozen=True, eq=False)
class Case:
    """A checkpoint on disk, the thinned model it was written from, the dense one. `part` is block or sublayer."""

    part: str
    site: str
    folder: Path
    model: nn.Module
    sample: Any
    dense: nn.Module


def no(error: BaseException | str) -> str:
    """A cell that says no, with the reason in one short line without places of this machine."""
    if isinstance(error, LaminaError):
        text = str(error)
    elif isinstance(error, BaseException):
        first = (str(error).strip().splitlines() or [""])[0]
        text = f"{type(error).__name__}: {first}"
    else:
        text = error
    text = re.sub(r"(?<![\w/:])/(?:[\w.@+=-]+/)+", "", " ".join(text.split()))
    text = re.sub(r"0x[0-9a-f]{6,}", "0x…", text)
    return f"no: {text if len(text) <= LONGEST else text[: LONGEST - 1] + '…'}"


def examine(specimen: Specimen, tell: Tell, folder: Path | None = None) -> list[Case]:
    """Tell the cells up to `sublayer`, and those after it that do not apply; give what is left to reload.

    Checkpoints are written below `folder`; without one, or for other libraries' models, nothing is.
    """
    model, sample = specimen.model, specimen.sample
    tell("kind", type(model).__name__)
    tell("note", specimen.note)
    saves = folder is not None and hasattr(model, "save_pretrained") and "/" not in specimen.name
    generates = saves and bool(getattr(model, "can_generate", bool)())
    with quiet():
        try:
            dense = outputs(model, sample)
        except Exception as error:
            tell("unbuilt", f"its forward fails: {no(error)[4:]}")
            return []
        for cell in () if saves or folder is None else CELLS[4:]:
            tell(cell, NA)
        anatomy = _found(specimen, tell)
        if anatomy is None:
            return []
        tell("certified", _answer(lambda: anatomy.certify(sample)))
        trials = _Trials(model, anatomy, sample, dense, folder if saves else None)
        tell("block", trials.blocks())
        tell("sublayer", trials.sublayers())
    for cell in CELLS[4:]:
        part = cell.partition("_")[0]
        if not saves or (cell == "generates" and not generates) or (part in trials.missing):
            tell(cell, NA)
        elif part != "generates" and not any(c.part == part for c in trials.cases):
            tell(cell, trials.unsaved.get(part) or no("nothing was dropped"))
        elif not trials.cases:
            tell(cell, no("nothing was dropped"))
    return trials.cases


def _found(specimen: Specimen, tell: Tell) -> Anatomy | None:
    """The anatomy, and what of it can be told; without one, all cells are told."""
    try:
        repeated = repeats(specimen.model, specimen.sample)
        anatomy = Anatomy.of(specimen.model, specimen.sample)
    except Exception as error:
        missing = isinstance(error, UnsupportedError) and not repeated
        tell("found", NA if missing else no(error))
        for cell in CELLS[1:]:
            tell(cell, NA if missing else no("no anatomy"))
        return None
    tell("anatomy", describe(anatomy))
    tell("found", YES)
    return anatomy


def describe(anatomy: Anatomy) -> str:
    """The stacks in words: `encoder 4 × attention, mlp; decoder 4 × attention, cross_attention, mlp`."""
    return "; ".join(f"{k.name} {_blocks(k)}".strip() for k in anatomy.stacks)


def _blocks(stack: Stack) -> str:
    counts: dict[str, int] = {}
    for block in stack.blocks:
        parts = ", ".join(str(x.site.kind) for x in block.branches)
        counts[parts] = counts.get(parts, 0) + 1
    return " + ".join(f"{count} × {parts}" for parts, count in counts.items())


def _answer(ask: Callable[[], Any]) -> str:
    try:
        ask()
    except Exception as error:
        return no(error)
    return YES


class _Bench:
    """As much of a lab as `drop` needs: a model, and its anatomy."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self.model, self.anatomy = model, copy.copy(anatomy)
        self.anatomy.model = model

    def renew(self) -> None:
        """The anatomy is not asked for again."""


class _Trials:
    """Drops from one model, each on a copy and judged by the reference.

    `cases` are the checkpoints of those that hold, `unsaved` the reason for a part (block, sublayer) that could not be
    written, `missing` the parts that there are none of.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, sample: Any, dense: Outputs, folder: Path | None) -> None:
        self.model, self.anatomy, self.sample, self.folder = model, anatomy, sample, folder
        self.dense = dense
        self.cases: list[Case] = []
        self.unsaved: dict[str, str] = {}
        self.missing: set[str] = set()

    def blocks(self) -> str:
        """One block of each stack: the second, or if that one must stay the first that need not."""
        stacks = [[b.site for b in k.blocks] for k in self.anatomy.stacks if len(k.blocks) > 1]
        return self._all("block", [[second, first, *others] for first, second, *others in stacks])

    def sublayers(self) -> str:
        """One sublayer of each kind of each stack: of the second block, or of the first one that can spare it."""
        asked = []
        for stack in self.anatomy.stacks:
            order = [*stack.blocks[1:2], *stack.blocks[:1], *stack.blocks[2:]] if len(stack.blocks) > 1 else []
            branches = [x.site for b in order for x in b.branches]
            asked += [found for kind in sorted(SUBLAYERS) if (found := [s for s in branches if s.kind is kind])]
        return self._all("sublayer", asked)

    def _all(self, part: str, asked: Sequence[Sequence[Site]]) -> str:
        if not asked:
            self.missing.add(part)
            return NA
        answers = [_answer(lambda sites=sites: self._one(part, sites)) for sites in asked]
        return next((a for a in answers if a != YES), YES)

    def _one(self, part: str, sites: Sequence[Site]) -> None:
        site, thin, receipt = self._dropped(sites)
        try:
            got = outputs(thin, self.sample)
        except Exception as error:
            raise UnsupportedError(f"the thinned model fails: {no(error)[4:]}", where=site.id) from error
        try:
            expect_equal(got, self._reference(site), self.dense)
        except LaminaError as error:
            raise type(error)(error.what, where=site.id) from error
        if self.folder is not None:
            self._save(part, site, thin, receipt)

    def _dropped(self, sites: Sequence[Site]) -> tuple[Site, nn.Module, Receipt]:
        """The first of the sites that can go, and the copy without it."""
        refused: list[LaminaError] = []
        for site in sites:
            bench: Any = _Bench(copy.deepcopy(self.model), self.anatomy)
            try:
                return site, bench.model, Drop().apply(Step(rewrite="drop", sites=(site.id,)), bench)
            except UnsupportedError as error:
                refused.append(error)
        raise refused[0]

    def _reference(self, site: Site) -> Outputs:
        block = self.anatomy.block(site)
        if site.kind in SUBLAYERS:
            branch = self.anatomy.branch(site)
            with masked(self.model, f"{block.path}.{branch.outlet}", branch.outlet_index, self._way(block, branch)):
                return outputs(self.model, self.sample)
        blocks = self.anatomy.stack(site).blocks
        with handed_on(self.model, self.sample, [b.path for b in blocks], blocks.index(block)):
            return outputs(self.model, self.sample)

    def _way(self, block: Block, branch: Branch) -> Callable[[Tensor], Tensor] | None:
        """What happens between the branch's outlet and the stream; None where nothing does."""
        module = self.model.get_submodule(block.path)
        if not branch.way:
            return None
        return lambda tensor: reduce(lambda made, turn: turn(module, made), branch.way, tensor)

    def _save(self, part: str, site: Site, thin: nn.Module, receipt: Receipt) -> None:
        assert self.folder is not None
        folder = self.folder / f"{part}-{len(self.cases)}"
        try:
            save_checkpoint(thin, [receipt], None, folder)
        except Exception as error:
            self.unsaved.setdefault(part, no(error))
            return
        self.cases.append(Case(part, site.id, folder, thin, self.sample, self.model))


def reload(cases: Sequence[Case]) -> list[Any]:
    """The contract of each case: its evidence, or the error. Where one ends that of all, each half gets a process."""
    try:
        with quiet():
            asked = [(c.folder, c.model, c.sample, c.dense) for c in cases]
            found = contracts(asked, timeout=STARTING + LOADING * len(cases))
    except Exception as error:
        found = [error] * len(cases)
    ended = all(isinstance(f, Exception) and (not isinstance(f, ReloadError) or CRASHED in f.what) for f in found)
    if ended and len(cases) > 1:
        half = len(cases) // 2
        return reload(cases[:half]) + reload(cases[half:])
    return found


def judged(cases: Sequence[Case], outcomes: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """The cells (name, value) that the contracts of one specimen's cases decide."""
    pairs = list(zip(cases, outcomes, strict=True))
    for part in ("block", "sublayer"):
        found = [_reason(c, o) for c, o in pairs if c.part == part]
        if found:
            yield f"{part}_reloaded", next((f for f in found if f != YES), YES)
    told = [_generation(c, o) for c, o in pairs]
    yield "generates", next((t for t in told if t not in (YES, NA)), YES if YES in told else NA)
    yield "aside", "; ".join(dict.fromkeys(n for _, o in pairs for n in _not_asked(o)))


def _reason(case: Case, outcome: Any) -> str:
    return no(f"{case.site}: {_what(outcome)}") if isinstance(outcome, BaseException) else YES


def _generation(case: Case, outcome: Any) -> str:
    """What the contract says of decoding, as far as it asked."""
    if isinstance(outcome, BaseException):
        return _reason(case, outcome)
    return YES if any(e.name in GENERATES and e.high is not None for e in outcome) else NA


def _not_asked(outcome: Any) -> list[str]:
    """What the dense model itself does not keep, so that it was not asked of the thinned one."""
    found = [] if isinstance(outcome, BaseException) else [e for e in outcome if e.high is None]
    return [f"not asked, since the dense model fails: {CHECKS[e.name]}" for e in found]


def _what(error: Any) -> str:
    return error.what if isinstance(error, LaminaError) else no(error)[4:]
