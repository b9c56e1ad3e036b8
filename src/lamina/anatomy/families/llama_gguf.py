"""Llama-like causal LMs: which of their parameters a GGUF block holds, and which of their options it can't.

Plain data. Sources: llama.cpp's loaders of the architectures `llama` and `deci`; the pre-tokenizers are those of the
published `tokenizer.json` files, under the names that llama.cpp gives them.
"""

from __future__ import annotations

from dataclasses import dataclass

BODY = "model"
"""The causal LM's attribute that holds the decoder."""
LAYERS = "layers"
FINAL_NORM = "norm"
ROTARY = "rotary_emb"
ATTENTION = "self_attn"

ATTENTION_PARTS = {
    "input_layernorm.weight": "attn_norm",
    "self_attn.q_proj.weight": "q",
    "self_attn.k_proj.weight": "k",
    "self_attn.v_proj.weight": "v",
    "self_attn.o_proj.weight": "o",
}
MLP_PARTS = {
    "post_attention_layernorm.weight": "ffn_norm",
    "mlp.gate_proj.weight": "gate",
    "mlp.up_proj.weight": "up",
    "mlp.down_proj.weight": "down",
}
BIASES = {
    "self_attn.q_proj.bias": "q_bias",
    "self_attn.k_proj.bias": "k_bias",
    "self_attn.v_proj.bias": "v_bias",
    "self_attn.o_proj.bias": "o_bias",
    "mlp.gate_proj.bias": "gate_bias",
    "mlp.up_proj.bias": "up_bias",
    "mlp.down_proj.bias": "down_bias",
}
PARTS = ATTENTION_PARTS | MLP_PARTS | BIASES
"""Parameter of a block → field of `BlockWeights`. A block with any other parameter is refused."""

REASONS = (
    ("q_norm", "QK-norm, which neither `llama` nor `deci` computes"),
    ("k_norm", "QK-norm, which neither `llama` nor `deci` computes"),
    ("expert", "a mixture of experts"),
    ("router", "a mixture of experts"),
    ("feedforward_layernorm", "norms after the sublayers, which neither `llama` nor `deci` computes"),
    ("norm.bias", "a LayerNorm with a bias; `llama` and `deci` have RMSNorm alone"),
    ("qkv", "fused projections"),
    ("gate_up", "fused projections"),
    ("lora_", "an unmerged LoRA adapter"),
    ("sinks", "attention sinks, which neither `llama` nor `deci` computes"),
)
"""Part of a left-over parameter's name → why GGUF has no place for it; the first that fits is told."""

ACTIVATIONS = frozenset({"silu", "swish"})
STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary types whose frequencies do not depend on the length: exact as `rope_freqs` (and a scale of q and k)."""

REWRITES = {
    "drop": "",
    "merge": "",
    "laco": "",
    "fusegpt": "",
    "refit": "",
    "share": "",
    "foldgpt": "",
    "narrow": "",
    "slicegpt": "",
    "magnitude": "",
    "wanda": "",
    "sparsegpt": "",
    "random": "",
    "window": "`llama` and `deci` have attention to all tokens alone",
    "linear-attention": "`llama` and `deci` have softmax attention alone",
    "flatten": "llama.cpp runs the two sublayers of a block one after the other",
    "replace": "neither `llama` nor `deci` has a linear map in place of a sublayer",
    **dict.fromkeys(
        ("svd", "asvd", "svd-llm", "basis-sharing", "eora", "sret"),
        "neither `llama` nor `deci` has factorised projections",
    ),
    "merge-experts": "`llama` and `deci` as written here have dense MLPs alone",
    **dict.fromkeys(("parallel", "ladder"), "llama.cpp runs the two sublayers of a block one after the other"),
    **dict.fromkeys(("rms-norm", "no-norm"), "`llama` and `deci` have the norms of Llama alone"),
    "round": "",
    "gptq": "",
    "rsq": "",
    "sliderquant": "",
}
"""Rewrite → why GGUF can't hold what it makes; empty where it can."""
KINDS = {
    "moe": "`llama` and `deci` as written here have dense MLPs alone",
    "mixer": "`llama` and `deci` have attention and MLP alone",
    "cross_attention": "`llama` and `deci` are decoders without cross-attention",
    "expert": "`llama` and `deci` as written here have dense MLPs alone",
}
"""Part of a site's id → why GGUF can't hold it."""

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _WORDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _TAIL
QWEN2 = _WORDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _TAIL
QWEN35 = _WORDS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

Step = tuple[str, object]


@dataclass(frozen=True)
class PreTokenizer:
    """A pre-tokenizer: `name` in llama.cpp, its steps in `tokenizer.json`, and whether whole words skip the merges."""

    name: str
    steps: tuple[Step, ...]
    ignore_merges: bool = False


PRE_TOKENIZERS = (
    PreTokenizer("gpt-2", (("bytes", True),)),
    PreTokenizer("smollm", (("digits", True), ("bytes", True))),
    PreTokenizer("llama-bpe", (("split", LLAMA3), ("bytes", False)), ignore_merges=True),
    PreTokenizer("smaug-bpe", (("split", LLAMA3), ("bytes", False))),
    PreTokenizer("qwen2", (("split", QWEN2), ("bytes", False))),
    PreTokenizer("qwen35", (("split", QWEN35), ("bytes", False))),
)
"""`bytes`: ByteLevel without a prefix space, and whether it splits by GPT-2's regex; `digits`: each digit alone;
`split`: isolate the matches of a regex."""
