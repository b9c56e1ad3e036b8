"""The reload contract beyond causal language models: encoders, encoder-decoders, vision towers, several towers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_kinds import WIDTH, drop, kind, text
from transformers import LlamaConfig, LlamaForCausalLM

from lamina.core.documents import Receipt
from lamina.core.errors import InputError, ReloadError
from lamina.evaluators import _reload_child as child
from lamina.evaluators.reload import contract, contracts
from lamina.exporters.hf import form, save_checkpoint

STOCK = {
    "bert": ("block.1",),
    "vit": ("block.1",),
    "t5": ("decoder.block.1", "encoder.block.2"),
    "bart": ("decoder.block.0",),
    "llava": ("language_model.block.1", "vision_tower.block.0"),
}
SHIM = {
    "bert": ("block.0.attention", "block.1.mlp"),
    "vit": ("block.0.attention", "block.2"),
    "t5": ("encoder.block.1.mlp", "decoder.block.1.attention", "decoder.block.2"),
    "bart": ("decoder.block.0.attention", "decoder.block.1.cross_attention", "encoder.block.0"),
    "llava": ("vision_tower.block.1.attention", "language_model.block.0.attention", "language_model.block.2"),
}
AUTO = {
    "bert": "AutoModelForMaskedLM",
    "vit": "AutoModel",
    "t5": "AutoModelForSeq2SeqLM",
    "bart": "AutoModelForSeq2SeqLM",
    "llava": "AutoModelForImageTextToText",
}
DECODES = {"t5": ["reload_cache"], "bart": ["reload_cache"]}
TEXT = ["reload_cache", "reload_padding", "reload_generate"]
CASES = [(name, "stock") for name in STOCK] + [(name, "shim") for name in SHIM]


Written = tuple[Path, Any, Any] | tuple[Path, Any, Any, Any]


def save(folder: Path, model: Any, sample: Any, *sites: str) -> Receipt:
    receipt = drop(model, sample, *sites)
    save_checkpoint(model, [receipt], None, folder)
    return receipt


def again(name: str, dense: Written, root: Path) -> Written:
    """What was reloaded, thinned once more."""
    model = getattr(transformers, AUTO[name]).from_pretrained(dense[0], trust_remote_code=True).eval()
    site = {"t5": "decoder.block.0.mlp", "llava": "vision_tower.block.0"}[name]
    save(root / f"{name}_again", model, dense[2], site)
    return root / f"{name}_again", model, dense[2]


def first_format(root: Path) -> Written:
    """As checkpoints were before other classes than causal ones: the owner's path, no copies, one class's name."""
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, vocab_size=99, **WIDTH)).eval()
    save(root, model, {"input_ids": text()}, "block.0.attention", "block.2")
    data = json.loads((root / "config.json").read_text(encoding="utf-8"))
    for step in data["lamina"]["structure"]:
        del step["copies"], step["held"]
        step["owner"] = "model"
    data["architectures"] = ["LaminaForCausalLM"]
    data["auto_map"]["AutoModelForCausalLM"] = "modeling_lamina.LaminaForCausalLM"
    (root / "config.json").write_text(json.dumps(data), encoding="utf-8")
    return root, model, text()


def backwards(root: Path) -> Written:
    """BERT that is no decoder looks ahead: its cached decoding can't equal the full forward, dense or not."""
    config = transformers.BertConfig(num_hidden_layers=3, vocab_size=99, **WIDTH)
    dense = transformers.BertLMHeadModel(config).eval()
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = copy.deepcopy(dense)
    save(root, model, {"input_ids": text()}, "block.1")
    return root, model, text(), dense


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Written]:
    """Every case's folder, thinned model and inputs; one of them is spoilt."""
    root = tmp_path_factory.mktemp("kinds")
    torch.set_num_threads(1)
    found: dict[Any, Written] = {}
    for name, how in [*CASES, ("t5", "first"), ("vit", "spoilt")]:
        model, sample = kind(name)
        sites = {"stock": STOCK, "shim": SHIM, "first": {"t5": ("encoder.block.0",)}}.get(how, STOCK)[name]
        receipt = save(root / f"{name}_{how}", model, sample, *sites)
        found[name, how] = (root / f"{name}_{how}", model, sample)
        assert form(model, [receipt]) == ("shim" if how in ("shim", "first") else "stock")
    spoil(root / "vit_spoilt" / "model.safetensors")
    found |= {(name, "again"): again(name, found[name, "shim"], root) for name in ("t5", "llava")}
    found["llama", "old"] = first_format(root / "old")
    found["bert", "backwards"] = backwards(root / "backwards")
    return found


def spoil(path: Path) -> None:
    weights = load_file(path)
    weights["embeddings.position_embeddings"][0, 0, 0] += 0.25
    save_file(weights, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def outcomes(written: dict[Any, Written]) -> dict[Any, Any]:
    """All of them through one fresh process."""
    return dict(zip(written, contracts(list(written.values())), strict=True))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_it_reloads_in_a_fresh_process(case: tuple[str, str], outcomes: dict[Any, Any]) -> None:
    found = outcomes[case]
    assert not isinstance(found, ReloadError), found
    asked = DECODES.get(case[0], TEXT if case[0] == "llava" else [])
    assert [e.name for e in found] == ["reload_logits", *asked]
    assert found[0].value == 0.0
    assert all(e.high is not None and e.value <= e.high for e in found)


def test_a_spoilt_tensor_is_named(outcomes: dict[Any, Any]) -> None:
    found = outcomes["vit", "spoilt"]
    assert isinstance(found, ReloadError)
    assert "embeddings.position_embeddings differs by up to 0.25" in str(found)


@pytest.mark.parametrize("name", AUTO)
def test_the_auto_class_of_the_model_s_own_class_loads_it(name: str, written: dict[Any, Any]) -> None:
    folder, model, sample = written[name, "shim"]
    data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert list(data["auto_map"]) == ["AutoConfig", AUTO[name]]
    loaded = getattr(transformers, AUTO[name]).from_pretrained(folder, trust_remote_code=True)
    assert isinstance(loaded, type(model))
    assert loaded.can_generate() == type(model).can_generate()
    assert loaded.loss_type == model.loss_type
    with torch.no_grad():
        mine, other = (child.tensors(child.whole(m, sample)) for m in (model, loaded.eval()))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[k], other[k]) for k in mine)
    assert f"{AUTO[name]}.from_pretrained" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["t5", "llava"])
def test_what_was_reloaded_can_be_thinned_again(name: str, written: dict[Any, Any], outcomes: dict[Any, Any]) -> None:
    found = outcomes[name, "again"]
    assert not isinstance(found, ReloadError), found
    assert found[0].value == 0.0
    data = json.loads((written[name, "again"][0] / "config.json").read_text(encoding="utf-8"))["lamina"]
    assert data["model_class"] == type(written[name, "shim"][1]).__name__
    assert len(data["receipts"]) == 2


def test_nested_configs_count_what_remains(written: dict[Any, Any]) -> None:
    folder, model, _ = written["llava", "stock"]
    data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (data["text_config"]["num_hidden_layers"], data["vision_config"]["num_hidden_layers"]) == (2, 2)
    loaded = type(model).from_pretrained(folder)
    assert len(loaded.model.language_model.layers) == 2


def test_copies_of_the_config_count_what_remains(written: dict[Any, Any]) -> None:
    for how in ("stock", "shim"):
        folder, model, _ = written["t5", how]
        loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
        for one in (model, loaded):
            assert one.config.num_decoder_layers == one.decoder.config.num_layers == len(one.decoder.block) == 2


def test_a_checkpoint_of_the_first_format_still_loads(outcomes: dict[Any, Any]) -> None:
    found = outcomes["llama", "old"]
    assert not isinstance(found, ReloadError), found
    assert [e.name for e in found] == ["reload_logits", *TEXT]


def test_blocks_that_the_class_would_build_otherwise_need_the_shim(outcomes: dict[Any, Any]) -> None:
    """The first block of a T5 stack alone holds its position bias; the class would make one for the next block."""
    found = outcomes["t5", "first"]
    assert not isinstance(found, ReloadError), found
    assert found[0].value == 0.0


def test_what_the_dense_model_fails_is_not_the_rewrite_s_fault(written: dict[Any, Any], outcomes: Any) -> None:
    folder, model, ids, _ = written["bert", "backwards"]
    with pytest.raises(ReloadError, match="in memory already, cached decoding"):
        contract(folder, model, ids)
    found = {e.name: e for e in outcomes["bert", "backwards"]}
    assert found["reload_logits"].value == 0.0
    odd = found["reload_cache"]
    assert (odd.high, odd.n) == (None, 0)
    assert "the dense model itself fails: cached decoding against the full forward differ by" in odd.how


def test_inputs_are_tensors_by_name(tmp_path: Path) -> None:
    model, sample = kind("vit")
    with pytest.raises(InputError, match="tensors by name"):
        contract(tmp_path, model, {**sample, "output_attentions": True})  # type: ignore[dict-item]


def test_marks_of_pictures_are_taken_out_of_the_text_that_is_decoded() -> None:
    model, sample = kind("llava")
    ids = child.text(model, sample)
    assert ids is not None
    assert ids.shape == (2, 7)
    assert torch.equal(ids[:, :2], sample["input_ids"][:, :2])
    assert child.checks(kind("bert")[0], {"input_ids": text()}) == ()
