"""Hugging Face folders: what is in them, what loads them, and that they are whole or not there."""

from __future__ import annotations

import json
import resource
import stat
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lamina.core.documents import Budget, ModelRef, Receipt, Receipts, Step
from lamina.core.errors import InputError, UnsupportedError
from lamina.core.files import fingerprint
from lamina.core.sites import Cost
from lamina.exporters.hf import HuggingFace, form, save_checkpoint
from lamina.lab import Lab
from lamina.rewrites.drop import Drop
from lamina.testing.models import tiny

BLOCK = ("block.1",)
MIXED = ("block.0.attention", "block.1.mlp", "block.3")


def ids() -> torch.Tensor:
    return torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))


def thinned(name: str, sites: tuple[str, ...], **changes: Any) -> tuple[Any, Receipt]:
    model = tiny(name, **changes)
    return model, Drop().apply(Step(rewrite="drop", sites=sites), Lab(model, ids()))


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def tensors(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids(), use_cache=False).logits


def word_tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_whole_blocks_gone_make_a_plain_stock_checkpoint(name: str, tmp_path: Path) -> None:
    model, receipt = thinned(name, BLOCK)
    files = save_checkpoint(model, [receipt], word_tokenizer(), tmp_path / "out")
    assert form(model, [receipt]) == "stock"
    assert {f.name for f in files} >= {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert "tokenizer.json" in {f.name for f in files}
    data = config(tmp_path / "out")
    assert data["architectures"] == [type(model).__name__]
    assert data["dtype"] == "float32"
    assert not {"lamina", "auto_map", "quantization_config"} & set(data)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(model)
    assert loaded.config.num_hidden_layers == 3
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "falcon"])
def test_sublayers_gone_bring_the_shim_along(name: str, tmp_path: Path) -> None:
    model, receipt = thinned(name, MIXED)
    files = save_checkpoint(model, [receipt], None, tmp_path / "out")
    assert form(model, [receipt]) == "shim"
    assert "modeling_lamina.py" in {f.name for f in files}
    data = config(tmp_path / "out")
    assert data["lamina"]["receipts"][0]["sites"] == list(receipt.sites)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(logits(loaded), logits(model))


def test_the_shim_checkpoint_does_not_load_without_trust(tmp_path: Path) -> None:
    model, receipt = thinned("llama", MIXED)
    save_checkpoint(model, [receipt], None, tmp_path / "out")
    for trust in (False, None):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=trust)
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=trust)


@pytest.mark.parametrize("sites", [BLOCK, MIXED], ids=["stock", "shim"])
def test_tied_weights_are_stored_once(sites: tuple[str, ...], tmp_path: Path) -> None:
    model, receipt = thinned("llama", sites, tie_word_embeddings=True)
    save_checkpoint(model, [receipt], None, tmp_path / "out")
    stored = tensors(tmp_path / "out")
    assert len(stored) == len({id(p) for p in model.parameters()})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("sites", [BLOCK, MIXED], ids=["stock", "shim"])
def test_the_type_of_number_is_kept(sites: tuple[str, ...], tmp_path: Path) -> None:
    model, receipt = thinned("llama", sites)
    model.to(torch.bfloat16)
    save_checkpoint(model, [receipt], None, tmp_path / "out")
    assert config(tmp_path / "out")["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", trust_remote_code=True)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("sites", [BLOCK, MIXED], ids=["stock", "shim"])
def test_large_checkpoints_are_split_with_an_index(sites: tuple[str, ...], tmp_path: Path) -> None:
    model, receipt = thinned("llama", sites)
    files = save_checkpoint(model, [receipt], None, tmp_path / "out", shard="40KB")
    shards = [f for f in files if f.suffix == ".safetensors"]
    assert len(shards) > 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f.name for f in shards}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("sites", [BLOCK, MIXED], ids=["stock", "shim"])
def test_nothing_is_left_of_a_quantisation_and_the_model_is_as_it_was(sites: tuple[str, ...], tmp_path: Path) -> None:
    model, receipt = thinned("llama", sites)
    model.config.quantization_config = {"quant_method": "gguf"}
    model.is_quantized = True
    model.hf_quantizer = SimpleNamespace(quantization_config=None)
    before = dict(model.config.__dict__)
    save_checkpoint(model, [receipt], None, tmp_path / "out")
    assert "quantization_config" not in config(tmp_path / "out")
    assert model.config.__dict__ == before
    assert model.is_quantized


def test_packed_weights_are_refused(tmp_path: Path) -> None:
    model, receipt = thinned("llama", BLOCK)
    model.config.quantization_config = {"quant_method": "other"}
    packed = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    model.register_parameter("packed", packed)
    with pytest.raises(UnsupportedError, match="quantised"):
        save_checkpoint(model, [receipt], None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_generation_config_that_transformers_would_not_save_is_saved_as_it_is(tmp_path: Path) -> None:
    model, receipt = thinned("llama", BLOCK)
    model.generation_config.temperature = 0.2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_checkpoint(model, [receipt], None, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.2
    assert model.generation_config.temperature == 0.2


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    marks = set()
    for folder in ("a", "b"):
        model, receipt = thinned("llama", MIXED)
        save_checkpoint(model, [receipt], None, tmp_path / folder)
        marks.add(fingerprint(tmp_path / folder))
    assert len(marks) == 1


@pytest.mark.parametrize("first", ["block.0.mlp", "block.0.attention"])
def test_a_thinned_checkpoint_can_be_thinned_again(first: str, tmp_path: Path) -> None:
    model, receipt = thinned("llama", (first,))
    save_checkpoint(model, [receipt], None, tmp_path / "once")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "once", trust_remote_code=True)
    second = Drop().apply(Step(rewrite="drop", sites=("block.2",)), Lab(again, ids()))
    assert form(again, [second]) == "shim"
    save_checkpoint(again, [second], None, tmp_path / "twice")
    data = config(tmp_path / "twice")["lamina"]
    assert data["model_class"] == "LlamaForCausalLM"
    assert len(data["structure"]) == len(data["receipts"]) == 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "twice", trust_remote_code=True)
    direct, _ = thinned("llama", (first, "block.2"))
    assert torch.equal(logits(loaded), logits(again))
    assert torch.equal(logits(loaded), logits(direct))


def test_a_full_disk_leaves_the_older_folder_alone(tmp_path: Path) -> None:
    model, receipt = thinned("llama", BLOCK)
    to = tmp_path / "out"
    save_checkpoint(model, [receipt], None, to)
    before = fingerprint(to)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(InputError, match="can't write"):
            save_checkpoint(model, [receipt], None, to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert fingerprint(to) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_older_folder_is_replaced_whole(tmp_path: Path) -> None:
    to = tmp_path / "out"
    to.mkdir()
    (to / "left.bin").write_text("x")
    model, receipt = thinned("llama", BLOCK)
    files = save_checkpoint(model, [receipt], None, to)
    assert not (to / "left.bin").exists()
    assert len({stat.S_IMODE(f.stat().st_mode) for f in files}) == 1


@pytest.mark.parametrize(("sites", "trust"), [(BLOCK, False), (MIXED, True)], ids=["stock", "shim"])
def test_the_card_says_what_was_done_and_how_to_load_it(sites: tuple[str, ...], trust: bool, tmp_path: Path) -> None:
    model, receipt = thinned("llama", sites)
    run = SimpleNamespace(
        receipts=Receipts(model=ModelRef(name="org/dense", fingerprint="x"), plan="y", receipts=(receipt,)),
        budget=Budget(keep=0.75),
    )
    HuggingFace().export(model, run, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "base_model: org/dense" in text
    assert "Budget: keep 0.75 of the parameters." in text
    assert all(f"`{s}`" in text for s in receipt.sites)
    assert f"{receipt.after.parameters:,}" in text
    assert ("trust_remote_code=True" in text) is trust
    assert "licence applies" in text


def test_the_card_tells_what_is_gone_from_what_is_changed(tmp_path: Path) -> None:
    model, receipt = thinned("llama", BLOCK)
    other = Receipt(rewrite="refit", sites=("block.0.mlp",), before=receipt.after, after=receipt.after)
    save_checkpoint(model, [receipt, other], None, tmp_path / "out", name="dense")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "without `block.1`, made by lamina" in text
    assert "Changed by refit: `block.0.mlp`." in text


def test_what_the_loader_can_not_replay_is_named() -> None:
    fine = Receipt(
        rewrite="drop", sites=("block.1",), before=Cost(), after=Cost(), structure={"steps": [{"kind": "drop"}]}
    )
    odd = Receipt(
        rewrite="fold", sites=("block.2",), before=Cost(), after=Cost(), structure={"steps": [{"kind": "fold"}]}
    )
    assert HuggingFace().check([fine]) == []
    (problem,) = HuggingFace().check([fine, odd])
    assert problem.where == "block.2"
    assert "'fold'" in problem.what
    with pytest.raises(UnsupportedError, match=r"block\.2"):
        HuggingFace().export(tiny("llama"), SimpleNamespace(receipts=[odd]), Path("nowhere"))


class _Other(nn.Module):
    """A model of another library: it saves itself, and its config is a mapping that nothing here edits."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.inner = {"num_layers": 4}, nn.Linear(2, 2)

    def save_pretrained(self, folder: Path, **_: Any) -> None:
        (Path(folder) / "config.json").write_text(json.dumps(self.config), encoding="utf-8")


def test_a_checkpoint_whose_config_would_be_wrong_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="_Other is no transformers model"):
        save_checkpoint(_Other(), [], None, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_receipts_and_a_plain_module_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no receipts"):
        HuggingFace().export(tiny("llama"), SimpleNamespace(), tmp_path / "out")
    with pytest.raises(UnsupportedError, match="no transformers model"):
        save_checkpoint(torch.nn.Linear(2, 2), [], None, tmp_path / "out")
