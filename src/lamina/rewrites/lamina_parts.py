"""Modules that stand in a rewritten network, and how they come there: with torch alone.

This file travels with the weights beside `modeling_lamina.py`, which calls it. It knows no architecture: what is put
where is spelt out in `config.json` under `lamina.structure`.
"""

import copy

import torch
from torch import nn

from .lamina_attention import attend
from .lamina_layouts import Fixed, layout, resize


class Factors(nn.Module):
    """A linear map of low rank: x ↦ B (A x) + b, A [rank, inputs] and B [outputs, rank]."""

    def __init__(self, inputs, outputs, rank, bias=False):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=bias)

    @property
    def weight(self):
        """The map as one matrix [outputs, inputs]."""
        return self.up.weight @ self.down.weight

    @property
    def bias(self):
        """What is added [outputs], or None."""
        return self.up.bias

    def forward(self, x):
        """The map, by way of `rank` numbers."""
        return self.up(self.down(x))


class Corrected(nn.Module):
    """A linear map plus one of low rank: x ↦ W x + b + B (A x)."""

    def __init__(self, inputs, outputs, rank, bias=False):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.base = nn.Linear(inputs, outputs, bias=bias)
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)

    @property
    def weight(self):
        """The map as one matrix [outputs, inputs]; W alone while it is being loaded, since a shared one comes last."""
        own = self.up.weight @ self.down.weight
        return self.base.weight + own if own.device == self.base.weight.device else self.base.weight

    @property
    def bias(self):
        """What is added [outputs], or None."""
        return self.base.bias

    def forward(self, x):
        """Both maps."""
        return self.base(x) + self.up(self.down(x))


class Scaled(nn.Module):
    """A map that others have too, times a number of one's own: x ↦ gain · W x + b + B (A x), b and B A where told."""

    def __init__(self, inputs, outputs, rank=0, bias=False):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.base = nn.Linear(inputs, outputs, bias=False)
        self.gain = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.down = nn.Linear(inputs, rank, bias=False) if rank else None
        self.up = nn.Linear(rank, outputs, bias=False) if rank else None

    @property
    def weight(self):
        """The map as one matrix [outputs, inputs]; W alone while it is being loaded, since a shared one comes last."""
        if self.gain.device != self.base.weight.device:
            return self.base.weight
        whole = self.gain * self.base.weight
        return whole if self.up is None or self.down is None else whole + self.up.weight @ self.down.weight

    def forward(self, x):
        """All of it."""
        y = self.gain * self.base(x)
        y = y if self.up is None or self.down is None else y + self.up(self.down(x))
        return y if self.bias is None else y + self.bias


class Constant(nn.Module):
    """The same vector for every token: a map [1, width] of the number 1."""

    def __init__(self, width):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, width))

    def forward(self, x):
        """The vector, for all tokens of x [..., width]; by way of x, so that it is seen to belong to the stream."""
        return x * 0 + self.bias[0]


class RootMean(nn.Module):
    """x / √(mean x² + eps) · weight, computed in float32."""

    def __init__(self, width, eps, bias=False):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        """The norm over the last dimension."""
        y = x.float()
        y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight
        return y if self.bias is None else y + self.bias


class Mapped(nn.Module):
    """Stands where a branch's core stood: a map of its tokens, in the structure that the core returned.

    It holds no cache entry. `stream` is the position or keyword of the tokens, `returns` the (index, arity) of each
    nested tuple, `hands` what the core returned as it was given: (place in what it returns, position or keyword).
    """

    def __init__(self, function, stream=0, returns=(), hands=()):
        super().__init__()
        self.map, self.stream = function, stream
        self.returns, self.hands = tuple(tuple(r) for r in returns), tuple(tuple(h) for h in hands)

    def forward(self, *args, **kwargs):
        """The map of the tokens."""
        out = self.map(args[self.stream] if isinstance(self.stream, int) else kwargs[self.stream])
        for index, arity, *form in reversed(self.returns):
            made = (out if i == index else None for i in range(arity))
            out = list(made) if form else tuple(made)
        if self.hands:
            handed = {i: args[place] if isinstance(place, int) else kwargs[place] for i, place in self.hands}
            out = type(out)(handed.get(i, value) for i, value in enumerate(out))
        return out


class Passing(nn.Identity):
    """Stands where a norm stood: gives its first argument. Who asks it for its weight's type gets an empty one."""

    def __init__(self, norm):
        super().__init__()
        if isinstance(weight := getattr(norm, "weight", None), torch.Tensor):
            self.register_buffer("weight", weight.detach().new_empty(0), persistent=False)

    def forward(self, *args, **kwargs):
        """The tokens as they are."""
        return args[0] if args else next(iter(kwargs.values()))


BUILDERS = {
    "linear": lambda s: nn.Linear(s["inputs"], s["outputs"], bias=s.get("bias", False)),
    "factors": lambda s: Factors(s["inputs"], s["outputs"], s["rank"], s.get("bias", False)),
    "corrected": lambda s: Corrected(s["inputs"], s["outputs"], s["rank"], s.get("bias", False)),
    "scaled": lambda s: Scaled(s["inputs"], s["outputs"], s.get("rank", 0), s.get("bias", False)),
    "constant": lambda s: Constant(s["outputs"]),
    "root_mean": lambda s: RootMean(s["width"], s["eps"], s.get("bias", False)),
    "fixed": lambda s: Fixed(s["width"], s.get("centred", False), s.get("bias", False)),
}


def build(spec, like):
    """The module that plain data describes, of the type and on the device of a module's parameters."""
    parameter = next((p for p in like.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return BUILDERS[spec["type"]](spec).train(like.training)
    with torch.device(parameter.device):
        made = BUILDERS[spec["type"]](spec)
    return made.to(parameter.dtype).train(like.training).requires_grad_(parameter.requires_grad)


def swap(model, step):
    """Put new modules in the place of others: path → what it is."""
    for path, spec in step["modules"].items():
        model.set_submodule(path, build(spec, model.get_submodule(path)))


def _resize(module, tensor):
    """Tell a map, an embedding or a norm that has a narrower weight its size."""
    if getattr(module, "weight", None) is not tensor:
        return
    if hasattr(module, "normalized_shape"):
        module.normalized_shape = tuple(tensor.shape)
    if tensor.ndim == 2:
        outputs, inputs = tensor.shape if isinstance(module, (nn.Linear, nn.Embedding)) else tensor.shape[::-1]
        sizes = {"out_features": outputs, "nf": outputs, "in_features": inputs, "nx": inputs}
        sizes |= {"num_embeddings": outputs, "embedding_dim": inputs} if isinstance(module, nn.Embedding) else {}
        for name, number in sizes.items():
            if hasattr(module, name):
                setattr(module, name, number)


def narrow(model, step):
    """Keep a part of some tensors, and tell the modules and their configs the new numbers.

    `cuts`: name → [dimension, runs of what stays] (a run is [start, stop]); `tied`: name → other names of the same;
    `numbers`: path → attribute → number; `configs`: path → field → number, in a copy of the config that is the module's
    own; `config`: field of the model's config → [before, after], where all blocks are alike. `untied`: names that get
    a parameter of their own first.
    """
    for name in step.get("untied", ()):
        path, _, last = name.rpartition(".")
        held = getattr(model.get_submodule(path), last)
        setattr(model.get_submodule(path), last, nn.Parameter(held.detach().clone(), held.requires_grad))
        for table in ("_tied_weights_keys", "all_tied_weights_keys"):  # by which transformers ties again
            if name in (getattr(model, table, None) or {}):
                setattr(model, table, {k: v for k, v in getattr(model, table).items() if k != name})
    for name, cuts in step["cuts"].items():
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        held = getattr(module, last)
        tensor = held.detach()
        for dim, runs in cuts:
            rows = torch.cat([torch.arange(a, b, device=tensor.device) for a, b in runs])
            tensor = tensor.index_select(dim, rows)
        tensor = tensor.contiguous()
        made = nn.Parameter(tensor, held.requires_grad) if isinstance(held, nn.Parameter) else tensor
        for other in (name, *step.get("tied", {}).get(name, ())):
            path, _, last = other.rpartition(".")
            setattr(model.get_submodule(path), last, made)
            _resize(model.get_submodule(path), made)
    for path, numbers in step.get("numbers", {}).items():
        for name, number in numbers.items():
            setattr(model.get_submodule(path), name, number)
    for path, fields in step.get("configs", {}).items():
        module = model.get_submodule(path)
        module.config = copy.copy(module.config)
        for name, number in fields.items():
            setattr(module.config, name, number)
    for name, (_, after) in step.get("config", {}).items():
        setattr(model.config, name, after)


def share(model, step):
    """Let several parameters be one: in each group all become the first."""
    for source, *others in step["groups"]:
        path, _, last = source.rpartition(".")
        parameter = getattr(model.get_submodule(path), last)
        for name in others:
            path, _, last = name.rpartition(".")
            setattr(model.get_submodule(path), last, parameter)
    told(model, shared=True)


def told(model, shared=False):
    """Tell transformers, by the names of this moment, which parameters are one: it saves each once, and loads it tied.

    Nothing is told of a model that shares none of its own; what its class ties stays as the class says it.
    """
    own = getattr(type(model), "_tied_weights_keys", None) or {}
    earlier = (model.__dict__.get("_tied_weights_keys") or {}).keys() - own.keys()
    if not hasattr(model, "all_tied_weights_keys") or not (shared or earlier):
        return
    others = {k: v for k, v in model.all_tied_weights_keys.items() if k not in earlier}
    first, same = {}, {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in others and first.setdefault(id(parameter), name) != name:
            same[name] = first[id(parameter)]
    model._tied_weights_keys, model.all_tied_weights_keys = {**own, **same}, {**others, **same}


KINDS = {"swap": swap, "narrow": narrow, "share": share, "attend": attend, "layout": layout, "resize": resize}
