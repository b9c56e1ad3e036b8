"""DeciLM folders: each tensor's shape by a literal second version of the loaders' rules, and the model's logits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from lamina.core.documents import Receipt, Step
from lamina.core.errors import InputError, UnsupportedError
from lamina.core.registry import EXPORTERS, REWRITES
from lamina.exporters._deci_rules import disagreements, expected, mult_of, nearest_width, width_of
from lamina.exporters.deci import Deci
from lamina.lab import Lab
from lamina.lab.load import quiet
from lamina.testing.models import text, tiny
from lamina.testing.tools import tokenizer

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "dense": ((), {}),
    "blocks": (("block.1", "block.2"), {}),
    "attentions": (("block.1.attention", "block.3.attention"), {}),
    "MLPs, the first and the last too": (("block.0.mlp", "block.3.mlp"), {}),
    "everything, tied": (("block.0", "block.2.attention", "block.3.mlp"), {"tie_word_embeddings": True}),
    "all biases": (("block.2.attention",), {"attention_bias": True, "mlp_bias": True}),
    "biases of queries, keys and values": (("block.2.mlp",), {"name": "qwen2"}),
    "wide heads": (("block.1.mlp",), {"name": "qwen2", "head_dim": 16}),
    "rotary scaling": (("block.1.attention",), {"rope_parameters": LLAMA3}),
}


def thinned(sites: tuple[str, ...], name: str = "llama", **changes: Any) -> tuple[Any, tuple[Receipt, ...]]:
    """A tiny model with MLPs 512 wide, without these sites."""
    model: Any = tiny(name, vocab_size=300, intermediate_size=512, **changes)
    if not sites:
        return model, ()
    return model, (REWRITES.make("drop").apply(Step(rewrite="drop", sites=sites), Lab(model, text(2, 12))),)


def run(*receipts: Receipt, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(receipts=receipts, **more)


def held(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def literal_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """What vLLM's and TensorRT-LLM's loaders build from config.json, written out as they do it."""
    c = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert c["architectures"] == ["DeciLMForCausalLM"]
    assert c["model_type"] == "nemotron-nas"
    assert len(c["block_configs"]) == c["num_hidden_layers"]
    assert not c["block_configs"][0]["attention"]["no_op"]
    size = c["hidden_size"]
    assert size % c["num_attention_heads"] == 0
    found = {"model.embed_tokens.weight": (c["vocab_size"], size), "model.norm.weight": (size,)}
    if c["tie_word_embeddings"] is False:
        found["lm_head.weight"] = (c["vocab_size"], size)
    for i in range(c["num_hidden_layers"]):
        block, at = c["block_configs"][i], f"model.layers.{i}."
        if block["attention"]["no_op"] is False:
            assert block["attention"]["replace_with_linear"] is False
            assert block["attention"]["sparsify"] is None
            queries = c["num_attention_heads"] * c["head_dim"]
            keys = (c["num_attention_heads"] // block["attention"]["n_heads_in_group"]) * c["head_dim"]
            found[at + "input_layernorm.weight"] = (size,)
            for letter, rows in (("q", queries), ("k", keys), ("v", keys)):
                found[f"{at}self_attn.{letter}_proj.weight"] = (rows, size)
                if c["qkv_bias"]:
                    found[f"{at}self_attn.{letter}_proj.bias"] = (rows,)
            found[at + "self_attn.o_proj.weight"] = (size, queries)
            if c["attention_bias"]:
                found[at + "self_attn.o_proj.bias"] = (size,)
        if block["ffn"]["no_op"] is False:
            assert block["ffn"]["replace_with_linear"] is False
            assert block["ffn"]["sparsify"] is None
            width = literal_width(block["ffn"]["ffn_mult"], size)
            found[at + "post_attention_layernorm.weight"] = (size,)
            for word, (rows, columns) in {"gate": (width, size), "up": (width, size), "down": (size, width)}.items():
                found[f"{at}mlp.{word}_proj.weight"] = (rows, columns)
                if c["mlp_bias"]:
                    found[f"{at}mlp.{word}_proj.bias"] = (rows,)
    return found


def literal_width(ffn_mult: float, size: int) -> int:
    wanted = int(2 * ffn_mult * size / 3)
    if wanted % 256 == 0:
        return wanted
    return wanted + 256 - (wanted % 256)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=text(2, 16), use_cache=False).logits


@pytest.mark.parametrize("case", CASES)
def test_shapes_are_what_the_loaders_build_and_logits_are_the_models(case: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    sites, changes = CASES[case]
    model, receipts = thinned(sites, **changes)
    to = tmp_path / "out"
    files = Deci().export(model, run(*receipts, tokenizer=tokenizer()), to)
    assert {"config.json", "model.safetensors", "modeling_decilm.py", "tokenizer.json"} <= {f.name for f in files}
    assert held(to) == literal_shapes(to)
    with quiet():
        loaded, info = AutoModelForCausalLM.from_pretrained(to, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values())
    assert type(loaded).__name__ == "DeciLMForCausalLM"
    assert torch.equal(logits(loaded), logits(model))


def test_kv_heads_and_widths_block_by_block(tmp_path: Path) -> None:
    """Blocks of 1, 2 and 4 KV heads, and MLPs 256 and 512 wide: the config says each."""
    model, _ = thinned(())
    for number, kv in ((1, 1), (2, 4)):
        attention = model.model.layers[number].self_attn
        attention.k_proj, attention.v_proj = (nn.Linear(32, kv * 8, bias=False) for _ in range(2))
        attention.num_key_value_groups = 4 // kv
    lab = Lab(model, text(2, 12))
    site = "block.3.mlp.neuron"
    step = Step(rewrite="narrow", sites=(site,), options={"gone": {site: list(range(256))}})
    receipt = REWRITES.make("narrow").apply(step, lab)
    to = tmp_path / "out"
    Deci().export(model, run(receipt), to)
    assert held(to) == literal_shapes(to)
    blocks = json.loads((to / "config.json").read_text(encoding="utf-8"))["block_configs"]
    assert [b["attention"]["n_heads_in_group"] for b in blocks] == [2, 4, 1, 2]
    assert held(to)["model.layers.3.mlp.up_proj.weight"] == (256, 32)


def test_blocks_without_anything_are_not_written(tmp_path: Path) -> None:
    model, receipts = thinned(("block.1.attention",))
    second = REWRITES.make("drop").apply(Step(rewrite="drop", sites=("block.1.mlp",)), Lab(model, text(2, 12)))
    Deci().export(model, run(*receipts, second), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"] == 3


REFUSED: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "the first attention is gone": (("block.0.attention",), {}, "block 0: the first block needs its attention"),
    "a block goes, and the next has none": (("block.0", "block.1.attention"), {}, "block 0: the first block needs"),
    "a width that can't be said": ((), {"intermediate_size": 300}, "block 0: an MLP 300 wide.*narrow to 512"),
    "QK-norm": ((), {"name": "qwen3"}, "QK-norm"),
    "another scale of the stream": ((), {"name": "granite"}, "what Llama computes"),
    "rotary scaling that is read otherwise": (
        (), {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "'yarn' is computed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_loaders_can_not_build_is_refused(case: str, tmp_path: Path) -> None:
    sites, changes, words = REFUSED[case]
    name = changes.get("name", "llama")
    changes = {"intermediate_size": 512, "vocab_size": 300} | {k: v for k, v in changes.items() if k != "name"}
    model: Any = tiny(name, **changes)
    receipts = ()
    if sites:
        receipts = (REWRITES.make("drop").apply(Step(rewrite="drop", sites=sites), Lab(model, text(2, 12))),)
    with pytest.raises(Exception, match=words) as error:
        Deci().export(model, run(*receipts), tmp_path / "out")
    assert type(error.value).__name__ in ("UnsupportedError", "CertificateError")
    assert list(tmp_path.iterdir()) == []


def test_unequal_heads_and_linear_maps_are_refused(tmp_path: Path) -> None:
    model, _ = thinned(())
    site = "block.1.attention.kv_group"
    step = Step(rewrite="narrow", sites=(site,), options={"gone": {site: [0]}})
    receipt = REWRITES.make("narrow").apply(step, Lab(model, text(2, 12)))
    with pytest.raises(UnsupportedError, match="block 1: 2 query heads where other blocks have 4"):
        Deci().export(model, run(receipt), tmp_path / "out")
    model, _ = thinned(())
    step = Step(rewrite="replace", sites=("block.1.mlp",), options={"by": "linear"})
    receipt = REWRITES.make("replace").apply(step, Lab(model, text(8, 16)))
    (problem, *_) = Deci().check([receipt])
    assert "linear map" in problem.what
    assert "llama.cpp" not in problem.what


def test_tensorrt_llm_has_no_biases() -> None:
    model, receipts = thinned((), "qwen2")
    assert Deci().check(receipts, model) == []
    (problem,) = Deci(engine="tensorrt-llm").check(receipts, model)
    assert "biases" in problem.what
    with pytest.raises(InputError, match="vllm"):
        EXPORTERS.make("deci", {"engine": "sglang"})


@given(st.integers(1, 400), st.integers(8, 20_000))
def test_every_multiple_of_256_can_be_said(count: int, hidden: int) -> None:
    width = 256 * count
    mult = mult_of(width, hidden)
    assert mult is not None
    assert literal_width(mult, hidden) == width_of(mult, hidden) == width
    assert literal_width(json.loads(json.dumps(mult)), hidden) == width


@given(st.integers(1, 100_000))
def test_no_other_width_can_be_said_and_the_nearest_one_is_above(width: int) -> None:
    near = nearest_width(width)
    assert near == 256 * math.ceil(width / 256)
    assert (mult_of(width, 576) is not None) == (width == near)


@given(st.floats(0.001, 50), st.integers(8, 10_000))
def test_widths_are_read_as_the_loaders_read_them(mult: float, hidden: int) -> None:
    assert width_of(mult, hidden) == literal_width(mult, hidden)


def test_a_file_that_disagrees_with_its_config_is_named(tmp_path: Path) -> None:
    model, receipts = thinned(("block.1.attention",))
    Deci().export(model, run(*receipts), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    shapes = held(tmp_path / "out")
    assert disagreements(config, shapes) == []
    assert expected(config) == literal_shapes(tmp_path / "out")
    name = "model.layers.2.mlp.up_proj.weight"
    (problem,) = disagreements(config, {**shapes, name: (500, 32)})
    assert (problem.where, "500" in problem.what) == (name, True)
    (problem,) = disagreements(config, {k: v for k, v in shapes.items() if k != name})
    assert "nothing" in problem.what
    config["block_configs"][1]["attention"] = config["block_configs"][0]["attention"]
    assert len(disagreements(config, shapes)) == 5
