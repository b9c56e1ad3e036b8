"""A tiny llama as GGUF, with a byte-level tokenizer, chat template and special tokens, for the tests of loading."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
WIDTH, DEPTH, HIDDEN = 32, 2, 64


def vocabulary() -> list[str]:
    """Three special tokens, then the 256 bytes in GPT-2's letters."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    letters = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}
    return ["<unk>", "<s>", "</s>", *(letters[b] for b in range(256)), "Ġt", "he"]


def write(path: Path, *, architecture: str = "llama") -> Path:
    """Write the file; weights are drawn from a fixed seed."""
    rng = np.random.default_rng(0)
    out = gguf.GGUFWriter(path, architecture)
    out.add_name("Tiny")
    out.add_context_length(128)
    out.add_embedding_length(WIDTH)
    out.add_block_count(DEPTH)
    out.add_feed_forward_length(HIDDEN)
    out.add_head_count(4)
    out.add_head_count_kv(2)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(10000.0)
    tokens = vocabulary()
    out.add_vocab_size(len(tokens))
    out.add_tokenizer_model("gpt2")
    out.add_token_list(tokens)
    out.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    out.add_token_merges(["Ġ t", "h e"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_unk_token_id(0)
    out.add_pad_token_id(2)
    out.add_chat_template(TEMPLATE)

    def tensor(name: str, *shape: int) -> None:
        scale = 1.0 if len(shape) == 1 else 0.2
        out.add_tensor(name, (scale * rng.standard_normal(shape)).astype(np.float32))

    tensor("token_embd.weight", len(tokens), WIDTH)
    tensor("output_norm.weight", WIDTH)
    for n in range(DEPTH):
        for part, rows, columns in (
            ("attn_q", WIDTH, WIDTH),
            ("attn_k", WIDTH // 2, WIDTH),
            ("attn_v", WIDTH // 2, WIDTH),
            ("attn_output", WIDTH, WIDTH),
            ("ffn_gate", HIDDEN, WIDTH),
            ("ffn_up", HIDDEN, WIDTH),
            ("ffn_down", WIDTH, HIDDEN),
        ):
            tensor(f"blk.{n}.{part}.weight", rows, columns)
        tensor(f"blk.{n}.attn_norm.weight", WIDTH)
        tensor(f"blk.{n}.ffn_norm.weight", WIDTH)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path
