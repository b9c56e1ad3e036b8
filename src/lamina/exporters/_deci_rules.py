"""What vLLM and TensorRT-LLM build from a DeciLM config, as rules: blocks may lack sublayers, all else is narrow.

The rules, from both loaders' code:
1. A block's `attention.no_op` or `ffn.no_op` leaves the sublayer out, its norm too. Nothing else tells of it.
2. The first block keeps its attention: vLLM adds the stream up one norm later, and has none to add before it.
3. Every attention has `num_attention_heads` query heads; `n_heads_in_group` of them share a KV head, block by block.
4. An MLP is int(2 · ffn_mult · hidden / 3) wide, rounded up to a multiple of 256.
5. SiLU, RMSNorm, one rotary embedding over whole heads; biases are all there or not at all (vLLM), or not at all
   (TensorRT-LLM). A linear map in a sublayer's place is read by TensorRT-LLM alone, so it is not written.
6. A tied head is not stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lamina.anatomy.families import decilm as family
from lamina.exporters._gguf_tensors import BlockWeights, Weights, rope_base
from lamina.exporters._problems import Problem

Shapes = dict[str, tuple[int, ...]]


def width_of(ffn_mult: float, hidden: int) -> int:
    """The width of the MLP that the loaders build."""
    exact = int(2 * ffn_mult * hidden / 3)
    return -(-exact // family.MULTIPLE) * family.MULTIPLE


def mult_of(width: int, hidden: int) -> float | None:
    """An `ffn_mult` of at most six digits behind the point from which the loaders make this width; None: there is none.

    It aims at the middle of the numbers that are rounded up to the width, so that no rounding of floats moves it.
    """
    found = round((width - family.MULTIPLE / 2) * 3 / (2 * hidden), 6)
    return found if width > 0 and width_of(found, hidden) == width else None


def nearest_width(width: int) -> int:
    """The next width at or above that can be written."""
    return max(-(-width // family.MULTIPLE), 1) * family.MULTIPLE


def problems(weights: Weights, engine: str) -> list[Problem]:
    """Why this engine can't load these tensors as DeciLM; empty where it can. All blocks have a sublayer at least."""
    kind = rope_base(weights.config)[1]
    found: list[Problem] = []
    if kind not in family.ROPES:
        found.append(Problem("rope_parameters", f"rotary scaling {kind!r} is computed differently there"))
    blocks = weights.blocks
    if not blocks or blocks[0].q is None:
        what = "the first block needs its attention: the engine has no stream to add to before it"
        found.append(Problem("block 0", what, "keep that attention, or drop its block whole"))
    heads = [(n, b.heads(weights.head_dim)) for n, b in enumerate(blocks) if b.q is not None]
    most = max((h for _, h in heads), default=0)
    for n, own in heads:
        if own != most:
            what = f"{own} query heads where other blocks have {most}; the config has one number for all"
            found.append(Problem(f"block {n}", what, "narrow whole KV groups of all blocks alike, or none"))
    hidden = int(weights.config.hidden_size)
    for n, block in enumerate(blocks):
        if block.gate is not None and mult_of(block.width, hidden) is None:
            near = nearest_width(block.width)
            what = f"an MLP {block.width} wide can't be said: the config tells multiples of {family.MULTIPLE} alone"
            found.append(Problem(f"block {n}", what, f"narrow to {near}"))
    return found + list(_bias_problems(blocks, engine))


SETS = (("q_bias", "k_bias", "v_bias"), ("o_bias",), ("gate_bias", "up_bias", "down_bias"))
"""Biases for which the config has one word each: qkv_bias, attention_bias, mlp_bias."""
OF = ("q", "q", "gate")


def _bias_problems(blocks: Sequence[BlockWeights], engine: str) -> Iterator[Problem]:
    for names, part in zip(SETS, OF, strict=True):
        rows = [(n, [getattr(b, name) is not None for name in names]) for n, b in enumerate(blocks) if _has(b, part)]
        if any(any(row) for _, row in rows):
            if engine == "tensorrt-llm":
                yield Problem(f"block {rows[0][0]}", "it has biases, which TensorRT-LLM's DeciLM does not load")
                return
            if not all(all(row) for _, row in rows):
                odd = next(n for n, row in rows if not all(row))
                yield Problem(f"block {odd}", f"only some of the biases {', '.join(names)} are there")


def _has(block: BlockWeights, part: str) -> bool:
    return getattr(block, part) is not None


def block_config(block: BlockWeights, head_dim: int, hidden: int) -> dict[str, Any]:
    """One entry of `block_configs`."""
    attends, feeds = block.q is not None, block.gate is not None
    group = block.heads(head_dim) // block.kv_heads(head_dim) if attends else None
    return {
        "attention": {
            "no_op": not attends, "replace_with_linear": False, "sparsify": None, "n_heads_in_group": group,
            "window_length": None, "num_sink_tokens": None, "use_prefill_window_in_sink_attention": False,
            "unshifted_sink": False,
        },
        "ffn": {
            "no_op": not feeds, "replace_with_linear": False, "sparsify": None,
            "ffn_mult": mult_of(block.width, hidden) if feeds else None,
        },
    }  # fmt: skip


def expected(config: Mapping[str, Any]) -> Shapes:
    """The name and shape of every tensor that the loaders build from the data of a config.json."""
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    dim = int(config.get("head_dim") or hidden // heads)
    o_bias = bool(config.get("attention_bias"))
    qkv_bias, mlp_bias = bool(config.get("qkv_bias", o_bias)), bool(config.get("mlp_bias"))
    rows = int(config["vocab_size"])
    found: Shapes = {family.EMBEDDING: (rows, hidden), family.FINAL_NORM: (hidden,)}
    if not config.get("tie_word_embeddings"):
        found[family.HEAD] = (rows, hidden)
    for number, block in enumerate(config["block_configs"]):
        shapes: dict[str, tuple[int, ...]] = {}
        if not block["attention"]["no_op"]:
            kv = heads // int(block["attention"]["n_heads_in_group"]) * dim
            shapes |= {"attn_norm": (hidden,), "q": (heads * dim, hidden), "k": (kv, hidden), "v": (kv, hidden)}
            shapes |= {"o": (hidden, heads * dim)}
            shapes |= {"q_bias": (heads * dim,), "k_bias": (kv,), "v_bias": (kv,)} if qkv_bias else {}
            shapes |= {"o_bias": (hidden,)} if o_bias else {}
        if not block["ffn"]["no_op"]:
            width = width_of(float(block["ffn"]["ffn_mult"]), hidden)
            shapes |= {"ffn_norm": (hidden,), "gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
            shapes |= {"gate_bias": (width,), "up_bias": (width,), "down_bias": (hidden,)} if mlp_bias else {}
        found |= {family.BLOCK.format(number, family.PARTS[k]): v for k, v in shapes.items()}
    return found


def disagreements(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[Problem]:
    """Tensors of a file that the loaders build otherwise from its config, or not at all; and those they miss."""
    wanted = expected(config)
    odd = [name for name in sorted({*wanted, *shapes}) if wanted.get(name) != shapes.get(name)]
    what = "the config says {}, the file has {}"
    return [Problem(n, what.format(wanted.get(n, "nothing"), shapes.get(n, "nothing"))) for n in odd]
