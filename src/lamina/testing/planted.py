"""Planted truth: models in which it is known by construction which site does nothing, and which blocks are alike."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lamina.anatomy import Anatomy, Block
from lamina.anatomy.watch import watch_blocks
from lamina.core.sites import SUBLAYERS


def silence(anatomy: Anatomy, *sites: str) -> None:
    """Make sublayers (or all of a block's) add exactly zero, by their weights, in place; nothing else changes.

    Raises RuntimeError where zero weights do not silence a branch.
    """
    gone = anatomy.expand(sites)
    with torch.no_grad():
        for site in gone:
            block = anatomy.model.get_submodule(anatomy.block(site).path)
            branch = anatomy.branch(site)
            for parameter in block.get_submodule(branch.core).parameters():
                parameter.zero_()
            for path in branch.own:
                for name, parameter in block.get_submodule(path).named_parameters():
                    if name.endswith("bias"):
                        parameter.zero_()
    loud = [site for site, size in added(anatomy).items() if site in gone and size != 0.0]
    if loud:
        raise RuntimeError(f"{', '.join(loud)} still adds something with all weights zero")


def twin(anatomy: Anatomy, first: int, second: int, stack: int = 0) -> None:
    """Make block `second` compute what block `first` computes, by copying its weights in place."""
    blocks = anatomy.stacks[stack].blocks
    source = anatomy.model.get_submodule(blocks[first].path)
    anatomy.model.get_submodule(blocks[second].path).load_state_dict(source.state_dict())


@torch.no_grad()
def added(anatomy: Anatomy, sample: Mapping[str, Tensor] | None = None) -> dict[str, float]:
    """The largest absolute number that each sublayer adds to the stream on a few tokens."""
    found: dict[str, float] = {}

    def note(_: Block, __: Tensor, branches: Mapping[str, Tensor], ___: Tensor) -> None:
        found.update({site: float(tensor.abs().max()) for site, tensor in branches.items()})

    with watch_blocks(anatomy.model, anatomy, note):
        anatomy.model(**(sample or anatomy.sample))
    return found


def identity_block(model: nn.Module, number: int) -> tuple[Anatomy, str]:
    """Turn block `number` of the first stack into the identity: the model's anatomy and the block's id."""
    anatomy = Anatomy.of(model)
    site = anatomy.stacks[0].blocks[number].site.id
    silence(anatomy, site)
    return anatomy, site


def silent_sublayer(model: nn.Module, number: int, place: int = 0) -> tuple[Anatomy, str]:
    """Silence the branch at `place` of block `number`: the model's anatomy and the sublayer's id."""
    anatomy = Anatomy.of(model)
    site = anatomy.stacks[0].blocks[number].branches[place].site.id
    silence(anatomy, site)
    return anatomy, site


def silent_model(model: nn.Module) -> Anatomy:
    """Silence every sublayer, so that all choices are ties."""
    anatomy = Anatomy.of(model)
    silence(anatomy, *(s.id for s in anatomy.sites if s.kind in SUBLAYERS))
    return anatomy
