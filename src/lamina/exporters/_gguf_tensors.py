"""A Llama-like causal LM, thinned or not, as the plain tensors that GGUF's `llama` and `deci` hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lamina.anatomy.families import llama_gguf as family
from lamina.core.errors import UnsupportedError
from lamina.exporters._problems import Problem
from lamina.maths.grids import GRIDS

if TYPE_CHECKING:
    from lamina.core.documents import Receipt

FILLER_WIDTH = 32
"""Neurons of the zero MLP that stands for a dropped one: llama.cpp drops a whole block whose width is 0."""


@dataclass(frozen=True, kw_only=True)
class BlockWeights:
    """One block. q [heads*d, hidden], k and v [kv*d, hidden], o [hidden, heads*d]; gate and up [width, hidden],
    down [hidden, width]; norms [hidden]; biases [rows]. A sublayer without tensors is absent. `types` names the GGUF
    types of the matrices that lie on their grids.
    """

    attn_norm: Tensor | None = None
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    o: Tensor | None = None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    ffn_norm: Tensor | None = None
    gate: Tensor | None = None
    up: Tensor | None = None
    down: Tensor | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    types: Mapping[str, str] = field(default_factory=dict[str, str])

    def heads(self, head_dim: int) -> int:
        """Query heads; 0 without attention."""
        return 0 if self.q is None else self.q.shape[0] // head_dim

    def kv_heads(self, head_dim: int) -> int:
        """Key-value heads; 0 without attention."""
        return 0 if self.k is None else self.k.shape[0] // head_dim

    @property
    def width(self) -> int:
        """Neurons; 0 without an MLP."""
        return 0 if self.gate is None else self.gate.shape[0]


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: frequency i is base^(-2i/d) / divisors[i]; q and k are scaled by `scale` each."""

    base: float
    divisors: Tensor | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Weights:
    """All tensors of a causal LM; `head` is None where it is tied to the embedding [vocabulary, hidden]."""

    config: Any
    blocks: tuple[BlockWeights, ...]
    embedding: Tensor
    final_norm: Tensor
    head: Tensor | None
    rope: Rope
    head_dim: int


def head_dim_of(config: Any) -> int:
    """Width of one head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def layers(model: nn.Module) -> list[nn.Module]:
    """The blocks in order, groups of blocks flattened."""

    def flat(items: Any) -> Iterator[nn.Module]:
        for item in items:
            if family.ATTENTION in dict(item.named_children()):
                yield item
            else:
                yield from flat(item.children())

    return list(flat(getattr(getattr(model, family.BODY), family.LAYERS)))


def inspect(model: nn.Module) -> list[Problem]:
    """Why this model's structure does not fit GGUF's `llama` or `deci`; empty where it does. Reads no weights."""
    body = getattr(model, family.BODY, None)
    if not all(hasattr(body, name) for name in (family.LAYERS, family.FINAL_NORM)):
        return [Problem(type(model).__name__, "not a Llama-like causal LM: no decoder blocks where Llama has them")]
    if getattr(model, "config", None) is None:
        return [Problem(type(model).__name__, "has no config, so its options are not known")]
    found = _config_problems(model.config) + _outer_problems(model)
    for index, layer in enumerate(layers(model)):
        found += _block_problems(index, layer, model.config)
    return found


def extract(model: nn.Module) -> Weights:
    """The tensors of a model that `inspect` has nothing against; raises UnsupportedError otherwise."""
    for problem in inspect(model):
        raise problem.error()
    body: Any = getattr(model, family.BODY)
    config: Any = model.config
    head_dim, rope = head_dim_of(config), _rope(body, config)
    blocks = tuple(_block(layer, head_dim, rope.scale) for layer in layers(model))
    embedding = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    head = model.get_output_embeddings().weight.detach()  # type: ignore[operator]
    return Weights(
        config=config,
        blocks=blocks,
        embedding=embedding,
        final_norm=getattr(body, family.FINAL_NORM).weight.detach(),
        head=None if head.data_ptr() == embedding.data_ptr() else head,
        rope=rope,
        head_dim=head_dim,
    )


def typed(weights: Weights, receipts: Sequence[Receipt]) -> Weights:
    """The same, with the types of the matrices that lie on a grid to which these receipts say that maps were rounded.

    Of two grids that hold a matrix it gets the one of fewer bits: the numbers are the same. Raises UnsupportedError
    where fewer matrices than the receipts name lie on one.
    """
    asked = _rounded(receipts)
    names = [name for name in GRIDS if name in asked.values()]
    blocks = tuple(replace(block, types=dict(_types(block, names))) for block in weights.blocks)
    lost = len(asked) - sum(len(block.types) for block in blocks)
    if lost > 0:
        what = f"{lost} of {len(asked)} rounded maps do not lie on the grid of {' or '.join(names)} any more"
        raise UnsupportedError(what, where="gguf", hint="heal and change weights first, and round them last")
    return replace(weights, blocks=blocks)


def _rounded(receipts: Sequence[Receipt]) -> dict[str, str]:
    """Rounded maps that are still there → the type. A rewrite that rounds says to which by its option `type`."""
    asked: dict[str, str] = {}
    for receipt in receipts:
        kind = receipt.options.get("type")
        if kind is not None:
            asked |= {s: str(kind[s] if isinstance(kind, Mapping) else kind) for s in receipt.sites}
        elif receipt.rewrite == "drop":
            gone = tuple(f"{s}." for s in receipt.sites)
            asked = {s: k for s, k in asked.items() if not s.startswith(gone)}
    return asked


def _types(block: BlockWeights, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Field → type of the block's matrices that lie on one of these grids."""
    for part in family.PARTS.values():
        matrix = getattr(block, part)
        if matrix is not None and matrix.ndim > 1:
            found = next((name for name in names if GRIDS[name].holds(matrix)), None)
            if found is not None:
                yield part, found


def fill(blocks: tuple[BlockWeights, ...], hidden: int, head_dim: int) -> tuple[BlockWeights, ...]:
    """Blocks as llama.cpp can load them, computing the same.

    Blocks without both sublayers go. An absent MLP becomes a zero one, FILLER_WIDTH wide. llama.cpp takes the width
    of all heads from block 0, so an absent attention there becomes one zero head.
    """
    kept = [block for block in blocks if block.q is not None or block.gate is not None]
    return tuple(_filled(block, index == 0, hidden, head_dim) for index, block in enumerate(kept))


def _filled(block: BlockWeights, first: bool, hidden: int, head_dim: int) -> BlockWeights:
    like = block.gate if block.q is None else block.q
    zeros, ones = like.new_zeros, like.new_ones(hidden)  # type: ignore[union-attr]
    if block.gate is None:
        wide = zeros(FILLER_WIDTH, hidden)
        return replace(block, ffn_norm=ones, gate=wide, up=wide, down=zeros(hidden, FILLER_WIDTH))
    if block.q is None and first:
        one = zeros(head_dim, hidden)
        return replace(block, attn_norm=ones, q=one, k=one, v=one, o=zeros(hidden, head_dim))
    return block


def interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Rows [heads*d, …] from halves (i pairs with i + d/2, transformers) to neighbours (2i with 2i+1, llama.cpp)."""
    halves = weight.reshape(-1, 2, head_dim // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _block(layer: nn.Module, head_dim: int, scale: float) -> BlockWeights:
    parts: dict[str, Any] = {family.PARTS[name]: tensor.detach() for name, tensor in layer.named_parameters()}
    if "q" not in parts:
        parts.pop("attn_norm", None)
    if "gate" not in parts:
        parts.pop("ffn_norm", None)
    scaling = getattr(getattr(layer, family.ATTENTION), "scaling", None)
    q_scale = scale * (1.0 if scaling is None else float(scaling) * math.sqrt(head_dim))
    for name, factor in (("q", q_scale), ("q_bias", q_scale), ("k", scale), ("k_bias", scale)):
        if name in parts and not math.isclose(factor, 1.0, rel_tol=1e-9):
            parts[name] = (parts[name].float() * factor).to(parts[name].dtype)
    return BlockWeights(**parts)


def rope_base(config: Any) -> tuple[float, str]:
    """The base and the type of the rotary embedding."""
    table = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    base = table.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0
    return float(base), str(table.get("rope_type") or table.get("type") or "default")


def _rope(body: Any, config: Any) -> Rope:
    base, _ = rope_base(config)
    rotary = getattr(body, family.ROTARY, None)
    if rotary is None:
        return Rope(base)
    dim = head_dim_of(config)
    plain = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    divisors = (plain / rotary.inv_freq.detach().double().cpu()).float()
    same = torch.allclose(divisors, torch.ones_like(divisors), rtol=1e-5)
    return Rope(base, None if same else divisors, float(getattr(rotary, "attention_scaling", 1.0)))


def _config_problems(config: Any) -> list[Problem]:
    found: list[Problem] = []
    act = str(getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None))
    if act not in family.ACTIVATIONS:
        found.append(Problem("hidden_act", f"the MLPs use {act}; `llama` and `deci` compute SiLU"))
    table = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in table.values()):
        found.append(Problem("rope_parameters", "a rotary embedding per layer type; `llama` and `deci` have one"))
        return found
    kind = rope_base(config)[1]
    if kind not in family.STATIC_ROPE:
        found.append(Problem("rope_parameters", f"rotary scaling {kind!r} depends on the length"))
    part = table.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    if part != 1.0:
        found.append(Problem("partial_rotary_factor", f"{part} of each head is rotated; `llama` and `deci` rotate all"))
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    slides = types is None or any("sliding" in kind or "chunked" in kind for kind in types)
    if window and slides and window < config.max_position_embeddings:
        found.append(
            Problem("sliding_window", f"attention sees {window} tokens; llama.cpp's `llama` and `deci` see all of them")
        )
    return found


def _outer_problems(model: nn.Module) -> list[Problem]:
    """Parameters outside the blocks that are neither embedding, final norm nor head."""
    stack = f"{family.BODY}.{family.LAYERS}."
    known = {f"{family.BODY}.{family.FINAL_NORM}.weight"}
    inner, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if inner is None or head is None:
        return [Problem(type(model).__name__, "no embedding or no language-model head")]
    mine = {id(inner.weight), id(head.weight)}
    rest = [
        name
        for name, tensor in model.named_parameters()
        if not name.startswith(stack) and name not in known and id(tensor) not in mine
    ]
    return [Problem(rest[0], _reason(rest))] if rest else []


def _reason(names: list[str]) -> str:
    for part, reason in family.REASONS:
        if any(part in name for name in names):
            return reason
    return "`llama` and `deci` have no tensor for this parameter"


def _block_problems(index: int, layer: nn.Module, config: Any) -> list[Problem]:
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.named_parameters()}
    unknown = [name for name in shapes if name not in family.PARTS]
    if unknown:
        return [Problem(f"block {index}, {unknown[0]}", _reason(unknown))]
    for parts in (family.ATTENTION_PARTS, family.MLP_PARTS):
        norm, *matrices = parts
        have = [name for name in matrices if name in shapes]
        missing = [name for name in (norm, *matrices) if name not in shapes]
        if have and missing:
            return [Problem(f"block {index}, {missing[0]}", "is missing, so the sublayer is not Llama's")]
    by_field = {family.PARTS[name]: shape for name, shape in shapes.items()}
    return _shape_problems(index, by_field, head_dim_of(config), config.hidden_size)


def _shape_problems(index: int, shapes: dict[str, tuple[int, ...]], dim: int, hidden: int) -> list[Problem]:
    where = f"block {index}"
    if "q" in shapes:
        rows, kv = shapes["q"][0], shapes["k"][0]
        if rows % dim or kv % dim or kv == 0 or rows % kv:
            return [Problem(where, f"{rows} query and {kv} key rows do not make whole groups of heads of {dim}")]
        if shapes["v"][0] != kv or shapes["o"] != (hidden, rows):
            return [Problem(where, "keys and values, or queries and output, differ in width")]
    if "gate" in shapes:
        width = shapes["gate"][0]
        if shapes["up"][0] != width or shapes["down"] != (hidden, width) or width == 0:
            return [Problem(where, "gate, up and down differ in width")]
    return []
