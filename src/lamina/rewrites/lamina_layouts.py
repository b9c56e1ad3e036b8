"""Blocks whose sublayers read the stream as it was earlier, norms that are none any more, one expert for several.

This file travels with the weights beside `modeling_lamina.py`, and needs torch alone. It knows no architecture: what is
laid out how is spelt out in `config.json` under `lamina.structure`.
"""

from functools import cache, partial

import torch
from torch import nn


class Fixed(nn.Module):
    """A norm whose divisor is a constant, and part of the weights: x · weight + bias, `centred`: (x - mean x)."""

    def __init__(self, width, centred=False, bias=False):
        super().__init__()
        self.centred = centred
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        """The map of the last dimension, computed in float32."""
        y = x.float()
        y = (y - y.mean(-1, keepdim=True) if self.centred else y) * self.weight.float()
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)


class Centred(nn.Module):
    """What a module returns, less its mean over the last dimension. Stands before the module's own class."""

    def forward(self, *args, **kwargs):
        """Computed in float32."""
        out = super().forward(*args, **kwargs)
        wide = out.float()
        return (wide - wide.mean(-1, keepdim=True)).to(out.dtype)


class Early(nn.Module):
    """A block whose sublayers read the stream as it was before some of what had joined it. Before the block's class.

    `lamina_layout`: `stream` is the position or keyword of the tokens, `returns` the (index, arity) of each nested
    tuple, `sublayers` in the order in which they join: `outlet` (path, place among what it returns, factor), `reads`
    (path, position or keyword) where it takes the stream, and how many of the block's sublayers it has `seen` there;
    -1: not even what the block `behind` had added last. That block is the one that `tells` by this name.
    A stream that comes from elsewhere (the block is run alone) holds nothing to be left out.
    """

    lamina_layout: dict

    def forward(self, *args, **kwargs):
        """The block, with other inputs for its sublayers."""
        told, added, handles = self.lamina_layout, [], []
        place = told["stream"]
        stream = args[place] if isinstance(place, int) else kwargs[place]
        for sublayer in told["sublayers"]:
            made = partial(_earlier, stream, added, sublayer["seen"], told.get("behind"))
            for path, where in sublayer["reads"]:
                hook = partial(_hand, where, made)
                module = self.get_submodule(path)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
            path, index, scale = sublayer["outlet"]
            note = partial(_note, added, index, scale, stream.shape)
            handles.append(self.get_submodule(path).register_forward_hook(note, prepend=True))
        try:
            out = super().forward(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        if "tells" in told:
            leaving = out
            for index, *_ in told["returns"]:
                leaving = leaving[index]
            leaving.lamina_last = (told["tells"], added[-1])
        return out


class Aliased(nn.Module):
    """Experts of which several numbers are one: a token's choice of number n goes to `table[n]`. Before their class.

    `lamina_layout`: the `table`. Tokens, choices and gates are the module's first arguments.
    """

    lamina_layout: dict

    def forward(self, tokens, chosen, *others, **kwargs):
        """The experts, by their own numbers."""
        table = torch.tensor(self.lamina_layout["table"], device=chosen.device)
        return super().forward(tokens, table[chosen], *others, **kwargs)


def _earlier(stream, added, seen, behind):
    """The stream [batch, tokens, width] after the first `seen` of what joins it in this block."""
    if seen < 0:
        name, last = getattr(stream, "lamina_last", (None, None))
        return stream - last if name is not None and name == behind else stream
    return sum(added[:seen], start=stream)


def _hand(where, made, module, args, kwargs):
    """Other tokens at a position or keyword."""
    if isinstance(where, int):
        return (*args[:where], made(), *args[where + 1 :]), kwargs
    return args, {**kwargs, where: made()}


def _note(added, index, scale, shape, module, args, output):
    """Keep what a sublayer adds to the stream."""
    found = _leaves(output)[index].reshape(shape)
    added.append(found if scale == 1 else found * scale)


def _leaves(value):
    """What nested tuples, lists and dicts hold, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, (tuple, list)) else [value]


WAYS = {"early": Early, "centred": Centred, "aliased": Aliased}


@cache
def _kind(way, base):
    """The class with something before it; it keeps its name, by which libraries find blocks."""
    return type(base.__name__, (WAYS[way], base), {"__module__": base.__module__, "lamina_way": way})


def layout(model, step):
    """Let modules behave otherwise, weights and their names as they are: path → `way` and what it must know."""
    for path, told in step["modules"].items():
        module = model.get_submodule(path)
        if getattr(module, "lamina_way", None) != told["way"]:
            module.__class__ = _kind(told["way"], type(module))
        made = {**getattr(module, "lamina_layout", {}), **{k: v for k, v in told.items() if k != "way"}}
        module.lamina_layout = made
        module.lamina_seen = str([s["seen"] for s in made.get("sublayers", ())])  # by which alike blocks are told apart


def resize(model, step):
    """Give tensors other shapes: zeros, until weights are loaded; name → shape. Their maps' sizes follow."""
    for name, shape in step["shapes"].items():
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        held = getattr(module, last)
        setattr(module, last, nn.Parameter(held.detach().new_zeros(shape), held.requires_grad))
        if last == "weight" and len(shape) == 2:
            outputs, inputs = shape if isinstance(module, nn.Linear) else shape[::-1]
            for names, number in ((("out_features", "nf"), outputs), (("in_features", "nx"), inputs)):
                for attribute in names:
                    if hasattr(module, attribute):
                        setattr(module, attribute, number)
