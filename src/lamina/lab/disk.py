"""Models larger than memory: opened without reading their weights, and surveyed block by block from disk.

A model that `open_streamed` opens can be called, taken apart and certified like any other. The weights of a block are
mapped in while it runs and let go afterwards; whatever else looks at a weight reads it from the file at that moment.
So it never is whole in memory, and it is slow: a forward reads the whole checkpoint. `streamed` reads each block once
for the whole text instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from lamina.anatomy import Anatomy
from lamina.anatomy.stacks import call, evaluating
from lamina.anatomy.trace import Flops
from lamina.core.errors import CertificateError, UnsupportedError
from lamina.lab._disk_course import Course, expect_walkable, prove
from lamina.lab._disk_files import States
from lamina.lab._disk_weights import Weights
from lamina.lab.feed import feeding, inner_path, wants_of
from lamina.lab.rows import Rows, real

if TYPE_CHECKING:
    from lamina.core.scores import Scores
    from lamina.lab.lab import Lab
    from lamina.lab.protocols import Tally

_OPEN: WeakKeyDictionary[nn.Module, Weights] = WeakKeyDictionary()
_PROVED: WeakSet[Anatomy] = WeakSet()


def open_streamed(path: Path, *, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """The model of a Hugging Face folder in evaluation mode, its weights left in its safetensors files.

    Any architecture: the class that config.json names, else that for causal language models. Vectors (norms, biases)
    and buffers are read at once, matrices when they are used; each is converted to `dtype` where the file has another.
    Raises InputError or UnsupportedError, one line, before any weight is read: for missing, truncated or corrupt
    files, and for weights that are missing, have another shape than the config says, or have no place in the model.
    """
    from lamina.lab._disk_open import open_folder

    model, weights = open_folder(path, dtype, trust_remote_code=trust_remote_code)
    _OPEN[model] = weights
    return model.eval()


def weights_of(model: nn.Module) -> Weights | None:
    """The weights on disk of a model that `open_streamed` opened: what is in memory, what was read; else None."""
    return _OPEN.get(model)


@contextmanager
def lending(model: nn.Module) -> Iterator[None]:
    """Inside, blocks may run with each other's weights: for what depends on shapes alone. See `Weights.lending`."""
    weights = weights_of(model)
    with weights.lending() if weights is not None else nullcontext():
        yield


def anatomy_of(model: nn.Module, sample: Mapping[str, Tensor] | None = None) -> Anatomy:
    """The certified anatomy of a model on disk, with its costs and linear maps; most blocks are read once.

    How a model is built is found with borrowed weights; the certificate then holds for its own. Where what a model does
    depends on its weights' values (how much it computes, or what happens to its stream), it is found with its own.
    """
    if weights_of(model) is not None:
        with suppress(CertificateError, UnsupportedError):
            anatomy, products = _borrowed(model, sample)
            with Flops() as own:
                anatomy.certify()
            if own.total == products:
                return anatomy
    anatomy = _looked_up(model, sample)
    anatomy.certify()
    return anatomy


def _borrowed(model: nn.Module, sample: Mapping[str, Tensor] | None) -> tuple[Anatomy, int]:
    """The anatomy as it is with borrowed weights, and the FLOPs of a forward on its sample."""
    with lending(model):
        anatomy = _looked_up(model, sample)
        with suppress(UnsupportedError):  # `streamed` looks again, and says so
            _prove(anatomy)
        with Flops() as counter, evaluating(model):
            call(model, anatomy.sample)
    return anatomy, counter.total


def _looked_up(model: nn.Module, sample: Mapping[str, Tensor] | None) -> Anatomy:
    anatomy = Anatomy.of(model, sample)
    anatomy.total()
    anatomy.linears()
    return anatomy


def streamed(lab: Lab, tallies: Iterable[Tally], *, scratch: Path | None = None, what: str = "survey") -> list[Scores]:
    """The scores that `lab.stream` gives, with each block needed once: all batches run through it, then the next one.

    The streams between two blocks [batch, tokens, width] stay in memory, or in one file in the folder `scratch`, which
    is taken whole at the start and gone at the end. Raises UnsupportedError where blocks can't be run one by one, and
    InputError where the folder can't hold the streams.
    """
    tallies = list(tallies)
    anatomy, weights = lab.anatomy, weights_of(lab.model)
    try:
        _prepare(anatomy, tallies)
        with ExitStack() as held:
            done: list[States] = []
            rows = list(lab.rows())
            for at in range(len(anatomy.stacks)):
                states = held.enter_context(States([r.mask.numel() for r in rows], scratch))
                _through(lab, at, rows, tallies, Course(anatomy, at, done, states), weights, what)
                done.append(states)
    finally:
        if weights is not None:
            weights.release()
    return [tally.scores() for tally in tallies]


def _prove(anatomy: Anatomy) -> None:
    """Raise UnsupportedError where running block by block is not what the model does; told once for each anatomy."""
    expect_walkable(anatomy)
    if anatomy not in _PROVED:
        prove(anatomy, weights_of(anatomy.model))
        _PROVED.add(anatomy)


def _prepare(anatomy: Anatomy, tallies: list[Tally]) -> None:
    """Prove that the walk is the model's own, with borrowed weights if these will do; find what will be looked up."""
    wants = wants_of(tallies)
    with lending(anatomy.model):
        with suppress(UnsupportedError):
            _prove(anatomy)
        if "linears" in wants:
            anatomy.linears()
        for site in anatomy.sublayers if "inner" in wants else ():
            inner_path(anatomy, site)
    _prove(anatomy)


def _through(
    lab: Lab, at: int, rows: list[Rows], tallies: list[Tally], course: Course, weights: Weights | None, what: str
) -> None:
    """All batches through one stack."""
    for row in rows:
        course.record(row.number, lambda row=row: lab.forward(row.batch, head=False, skipped=lab.depth))
    before = sum(len(k.blocks) for k in lab.anatomy.stacks[:at])
    blocks = course.stack.blocks
    for depth, block in enumerate(blocks):
        with weights.held(block.path) if weights is not None else nullcontext():
            if weights is not None and depth + 1 < len(blocks):
                weights.expect(blocks[depth + 1].path)
            for row in rows:
                with feeding(lab.anatomy, row, tallies, only=block):
                    course.step(row.number, depth)
                lab.counts.blocks += int(real(row.batch).sum())
                seen = row.offset - lab.offset + row.sequences
                lab.progress(what, (before + depth) * lab.sequences + seen, lab.depth * lab.sequences)
