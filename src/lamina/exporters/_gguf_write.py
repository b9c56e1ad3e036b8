"""Writing a GGUF file that stock llama.cpp loads: `llama` where all blocks are alike, `deci` where they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_TENSOR, GGMLQuantizationType, LlamaFileType
from torch import Tensor

from lamina.core.errors import InputError, UnsupportedError, did_you_mean
from lamina.core.files import atomic
from lamina.exporters._gguf_tensors import BlockWeights, Rope, fill, head_dim_of, interleave, rope_base
from lamina.exporters._gguf_vocab import read_vocabulary
from lamina.maths.grids import GRIDS

FORMATS = {
    "f32": (torch.float32, GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (torch.float16, GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (torch.bfloat16, GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}
"""Of the matrices without a type of their own; norms, biases and rotary divisors are always float32, as llama.cpp
wants them."""

_TENSORS = {
    "attn_norm": MODEL_TENSOR.ATTN_NORM,
    "q": MODEL_TENSOR.ATTN_Q,
    "k": MODEL_TENSOR.ATTN_K,
    "v": MODEL_TENSOR.ATTN_V,
    "o": MODEL_TENSOR.ATTN_OUT,
    "ffn_norm": MODEL_TENSOR.FFN_NORM,
    "gate": MODEL_TENSOR.FFN_GATE,
    "up": MODEL_TENSOR.FFN_UP,
    "down": MODEL_TENSOR.FFN_DOWN,
}
_ROTATED = ("q", "k")


@dataclass(frozen=True)
class Row:
    """A tensor of the file, whether its rows are to be interleaved, and the type of the grid that it lies on."""

    name: str
    tensor: Tensor
    rotated: bool = False
    type: str = ""


@dataclass(frozen=True)
class Layout:
    """What the header says of the blocks: heads, KV heads and MLP width of each."""

    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def architecture(self) -> str:
        """`llama`, whose blocks are all alike, or `deci` (Nemotron-NAS), which has a number per block."""
        alike = all(len(set(row)) == 1 for row in (self.heads, self.kv_heads, self.widths))
        return gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA if alike and self.heads[0] else gguf.MODEL_ARCH.DECI]


def layout_of(filled: Sequence[BlockWeights], head_dim: int) -> Layout:
    """The layout of blocks as `fill` gives them."""
    return Layout(
        tuple(b.heads(head_dim) for b in filled),
        tuple(b.kv_heads(head_dim) for b in filled),
        tuple(b.width for b in filled),
    )


def write_gguf(  # noqa: PLR0913
    path: Path,
    config: Any,
    blocks: Sequence[BlockWeights],
    embedding: Tensor,
    final_norm: Tensor,
    head: Tensor | None,
    tokenizer_source: Any,
    dtype: str = "f32",
    *,
    rope: Rope | None = None,
    name: str = "",
) -> Path:
    """Write one GGUF file, atomically, one tensor in memory at a time.

    `config` needs hidden_size, num_attention_heads, rms_norm_eps and max_position_embeddings, and may have head_dim
    and rope_parameters; `rope` must be given where its type is not the default. `head` is None where it is tied.
    `tokenizer_source`: a GGUF file, a folder with tokenizer.json, or a fast tokenizer.
    Raises UnsupportedError where llama.cpp could not run the result as the model ran.
    """
    if dtype not in FORMATS:
        raise InputError(f"gguf: no dtype {dtype!r}", hint=did_you_mean(dtype, FORMATS))
    base, kind = rope_base(config)
    if rope is None and kind != "default":
        raise InputError(f"rotary scaling {kind!r} needs its divisors", where="rope")
    rope = rope or Rope(base)
    head_dim = head_dim_of(config)
    filled = fill(tuple(blocks), config.hidden_size, head_dim)
    if not filled:
        raise UnsupportedError("no block is left, and llama.cpp needs at least one")
    layout = layout_of(filled, head_dim)
    vocabulary = read_vocabulary(tokenizer_source, embedding.shape[0])
    with atomic(path) as draft:
        writer = gguf.GGUFWriter(draft, layout.architecture)
        _header(writer, config, layout, rope, embedding.shape[0], name or path.stem)
        writer.add_file_type(_file_type(filled, dtype))
        for entry in vocabulary:
            writer.add_key_value(entry.key, entry.value, entry.type, entry.items)
        _body(writer, list(_tensors(filled, embedding, final_norm, head, rope, head_dim)), dtype, head_dim)
    return path


def _header(writer: gguf.GGUFWriter, config: Any, layout: Layout, rope: Rope, rows: int, name: str) -> None:
    head_dim = head_dim_of(config)
    same = layout.architecture == gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA]
    writer.add_type("model")
    writer.add_name(name)
    writer.add_block_count(len(layout.heads))
    writer.add_context_length(int(config.max_position_embeddings))
    writer.add_embedding_length(int(config.hidden_size))
    writer.add_feed_forward_length(layout.widths[0] if same else list(layout.widths))
    writer.add_head_count(layout.heads[0] if same else list(layout.heads))
    writer.add_head_count_kv(layout.kv_heads[0] if same else list(layout.kv_heads))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.base)
    writer.add_vocab_size(rows)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _tensors(
    blocks: Sequence[BlockWeights],
    embedding: Tensor,
    final_norm: Tensor,
    head: Tensor | None,
    rope: Rope,
    head_dim: int,
) -> Iterator[Row]:
    names = gguf.TENSOR_NAMES
    yield Row(f"{names[MODEL_TENSOR.TOKEN_EMBD]}.weight", embedding)
    yield Row(f"{names[MODEL_TENSOR.OUTPUT_NORM]}.weight", final_norm)
    if head is not None:
        yield Row(f"{names[MODEL_TENSOR.OUTPUT]}.weight", head)
    if rope.divisors is not None:
        yield Row(f"{names[MODEL_TENSOR.ROPE_FREQS]}.weight", rope.divisors)
    for index, block in enumerate(blocks):
        for field, tensor in _TENSORS.items():
            name, rotated = names[tensor].format(bid=index), field in _ROTATED
            if (weight := getattr(block, field)) is not None:
                yield Row(f"{name}.weight", weight, rotated, block.types.get(field, ""))
            if (bias := getattr(block, f"{field}_bias", None)) is not None:
                yield Row(f"{name}.bias", bias, rotated)


def _file_type(blocks: Sequence[BlockWeights], dtype: str) -> LlamaFileType:
    """The type of most of the blocks' matrices; llama.cpp only shows it."""
    matrices = [f for f in _TENSORS if "norm" not in f]
    counts = Counter(b.types.get(f, "") for b in blocks for f in matrices if getattr(b, f) is not None)
    most = counts.most_common(1)[0][0]
    name = f"{most}_S" if f"MOSTLY_{most}_S" in LlamaFileType.__members__ else most
    return LlamaFileType[f"MOSTLY_{name}"] if most else FORMATS[dtype][2]


def _body(writer: gguf.GGUFWriter, rows: list[Row], dtype: str, head_dim: int) -> None:
    try:
        for row in rows:
            raw, size = _stored(row, dtype)
            writer.add_tensor_info(row.name, tuple(row.tensor.shape), np.dtype(np.uint16), size, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for row in rows:
            writer.write_tensor_data(_bytes(row, dtype, head_dim))
    finally:
        writer.close()


def _stored(row: Row, dtype: str) -> tuple[GGMLQuantizationType, int]:
    """The tensor's type in the file, and its bytes there."""
    weights = row.tensor.numel()
    if row.type:
        grid = GRIDS[row.type]
        return GGMLQuantizationType[row.type], weights // grid.block * grid.size
    kind, raw, _ = FORMATS[dtype if row.tensor.ndim > 1 else "f32"]
    return raw, weights * torch.empty((), dtype=kind).element_size()


def _bytes(row: Row, dtype: str, head_dim: int) -> np.ndarray[Any, Any]:
    tensor = row.tensor.detach().cpu()
    tensor = interleave(tensor, head_dim) if row.rotated else tensor
    if row.type:
        written = GRIDS[row.type].written(tensor)
        if written is None:
            raise UnsupportedError(f"does not lie on the grid of {row.type}", where=row.name)
        return written.reshape(-1).numpy()
    kind = FORMATS[dtype if tensor.ndim > 1 else "f32"][0]
    out = tensor.to(kind).contiguous()
    if not bool(torch.isfinite(out).all()):
        fits = bool(torch.isfinite(tensor).all())
        what = f"has numbers beyond the range of {dtype}" if fits else "has numbers that are not finite"
        raise UnsupportedError(what, where=row.name, hint="write bf16 or f32" if fits else "")
    return out.reshape(-1).view(torch.uint8).numpy()
