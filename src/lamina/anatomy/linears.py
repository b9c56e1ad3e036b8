"""The linear maps of a model's branches that see every token of the stream: sites of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lamina.anatomy.parts import Block, Branch, Stack
from lamina.anatomy.stacks import call, evaluating
from lamina.core.errors import InputError
from lamina.core.sites import Cost, Kind, Site


def is_linear(module: nn.Module) -> bool:
    """Whether it is `x Wᵀ + b`, or transformers' `Conv1D`, which is `x W + b`."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def matrix(module: nn.Module) -> Tensor:
    """The map's weights [outputs, inputs]."""
    weight: Any = module.weight
    return weight if isinstance(module, nn.Linear) else weight.T


class LinearSites:
    """The part of an anatomy that knows linear maps. Blocks and branches come from `stacks`."""

    model: nn.Module
    stacks: tuple[Stack, ...]
    sample: dict[str, Any]

    def linears(self, site: Site | str | None = None) -> tuple[Site, ...]:
        """The linear maps of a sublayer or of a block, or of all; those that see every token, once in a forward.

        The maps of experts, which see the tokens that are routed to them, and those of a module that makes several
        passes are not among them.
        """
        known = site.id if isinstance(site, Site) else site
        found = self._linear_table()
        if known is None:
            return tuple(found.values())
        return tuple(s for i, s in found.items() if i.startswith(f"{known}."))

    def weight(self, site: Site | str) -> Tensor:
        """The weights [outputs, inputs] of a linear map."""
        known = site.id if isinstance(site, Site) else site
        if known not in self._linear_table():
            raise InputError("the model has no such linear map", where=known)
        return matrix(self.model.get_submodule(self._linear_table()[known].path))

    def _linear_table(self) -> dict[str, Site]:
        held = self.__dict__.get("_linears")
        if held is None or held[0] is not self.model:
            held = self.__dict__["_linears"] = (self.model, self._find_linears())
        return held[1]

    def _find_linears(self) -> dict[str, Site]:
        met = self._calls()
        found = {}
        for block in (b for k in self.stacks for b in k.blocks if b.turns == 1):
            for branch in block.branches:
                for name in _maps(self.model.get_submodule(block.path), branch):
                    path = f"{block.path}.{name}"
                    if met[path] == [1]:
                        inside = name.removeprefix(f"{branch.core}.")
                        site_id = f"{branch.site.id}.{inside}"
                        site_id += "_map" if inside in set(Kind) else ""
                        found[site_id] = Site(site_id, Kind.LINEAR, path, block.site.block)
        return found

    def _calls(self) -> Mapping[str, list[int]]:
        """Path → for each call in a forward on the sample, the share of the stream's tokens that it saw."""
        tokens, seen, handles = Counter[str](), dict[str, list[int]](), []

        def opens(_: nn.Module, args: Any, kwargs: Any, block: Block) -> None:
            stream = args[block.stream] if isinstance(block.stream, int) else kwargs[block.stream]
            tokens[block.path] = stream.shape[:-1].numel()

        def note(_: nn.Module, args: Any, block: Block, path: str) -> None:
            seen.setdefault(path, []).append(int(args[0].shape[:-1].numel() == tokens[block.path]))

        for block in (b for k in self.stacks for b in k.blocks):
            module = self.model.get_submodule(block.path)
            handles.append(
                module.register_forward_pre_hook(lambda m, a, k, b=block: opens(m, a, k, b), with_kwargs=True)
            )
            for branch in block.branches:
                for name in _maps(module, branch):
                    hook = lambda m, a, b=block, p=f"{block.path}.{name}": note(m, a, b, p)  # noqa: E731
                    handles.append(module.get_submodule(name).register_forward_pre_hook(hook))
        try:
            with torch.no_grad(), evaluating(self.model):
                call(self.model, self.sample)
        finally:
            for handle in handles:
                handle.remove()
        return {path: seen.get(path, []) for k in self.stacks for b in k.blocks for path in _paths(self.model, b)}

    def linear_cost(self, site: Site) -> Cost:
        """Parameters and bytes of a linear map; a multiply-add per weight and token."""
        parts = list(self.model.get_submodule(site.path).parameters(recurse=False))
        sizes = sum(p.numel() for p in parts), sum(p.numel() * p.element_size() for p in parts)
        return Cost(*sizes, macs=sum(p.numel() for p in parts if p.ndim > 1))


def _maps(block: nn.Module, branch: Branch) -> list[str]:
    """The linear maps that serve the branch alone, relative to the block."""
    found = []
    for path in (branch.core, *branch.own):
        for name, module in block.get_submodule(path).named_modules():
            if is_linear(module):
                found.append(f"{path}.{name}" if name else path)
    return list(dict.fromkeys(found))


def _paths(model: nn.Module, block: Block) -> list[str]:
    module = model.get_submodule(block.path)
    return [f"{block.path}.{name}" for branch in block.branches for name in _maps(module, branch)]
