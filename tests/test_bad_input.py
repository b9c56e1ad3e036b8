"""Bad input: one clear line, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_run
import torch

pytestmark = pytest.mark.usefixtures("alone")


# ---------------------------------------------------------------- models


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def corrupt(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32
    path.write_bytes(bytes(data))


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def half_a_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text(encoding="utf-8")[:50], encoding="utf-8")


def other_weights(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(
        path.read_text(encoding="utf-8").replace('"hidden_size": 32', '"hidden_size": 64'), encoding="utf-8"
    )


def remote_code(folder: Path) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text(encoding="utf-8")) | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    path.write_text(json.dumps(data), encoding="utf-8")


def encoder(folder: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    from lamina.lab.load import quiet

    shutil.rmtree(folder)
    config = BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    with quiet():
        BertForMaskedLM(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, ("model.safetensors", "truncated")),
        (corrupt, ("model.safetensors", "corrupt")),
        (empty, ("model.safetensors", "empty")),
        (pickled, ("pickle", "pytorch_model.bin")),
        (without_config, ("config.json",)),
        (half_a_config, ("config.json", "not valid JSON")),
        (other_weights, ("another shape",)),
        (remote_code, ("Python code", "--trust-remote-code")),
        (encoder, ("encoder", "causal LM")),
    ],
)
def test_a_damaged_or_unfit_model(
    lamina: Any, bench: Path, tmp_path: Path, damage: Callable[[Path], None], words: tuple[str, ...]
) -> None:
    shutil.copytree(bench / "model", tmp_path / "model")
    shutil.copy(bench / "calibration.txt", tmp_path)
    shutil.copy(bench / "heldout.txt", tmp_path)
    damage(tmp_path / "model")
    tiny_run.refused(lamina(*tiny_run.thin_command(tmp_path, tmp_path / "run", "--keep", "75%")), *words)
    assert not (tmp_path / "run").exists()
    tiny_run.refused(lamina("anatomy", tmp_path / "model"), *words)


def test_a_truncated_gguf(lamina: Any, bench: Path, tmp_path: Path) -> None:
    from lamina.exporters.gguf import Gguf
    from lamina.lab.load import load

    found = load(bench / "model", dtype="float32")
    (path,) = Gguf().export(found.model, SimpleNamespace(tokenizer=found.tokenizer), tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    for size in (len(whole) - 64, len(whole) // 2, 100, 3):
        path.write_bytes(whole[:size])
        tiny_run.refused(lamina("thin", path, "--keep", "75%", "--out", tmp_path / "run"), "tiny.gguf")
        assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("./nowhere", ("nowhere", "no such file or folder")),
        ("nowhere.gguf", ("nowhere.gguf", "no such file or folder")),
        ("smollm2-135n", ("smollm2-135n", "did you mean smollm2-135m?")),
    ],
)
def test_a_model_that_is_not_there(lamina: Any, tmp_path: Path, model: str, words: tuple[str, ...]) -> None:
    tiny_run.refused(lamina("thin", model, "--keep", "75%"), *words)
    assert [p.name for p in tmp_path.iterdir()] == []


def test_a_model_that_the_anatomy_does_not_explain(
    thin: Any, lamina: Any, bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    plain = LlamaDecoderLayer.forward

    def louder(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        return out + 0.01 * torch.tanh(out) if self.self_attn.layer_idx == 2 else out

    monkeypatch.setattr(LlamaDecoderLayer, "forward", louder)
    line = tiny_run.refused(thin("--keep", "75%"))
    assert "block" in line
    assert "2" in line
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert left <= {"recipe.yaml", "log.txt", ".state"}, "nothing that claims to be a result"
    tiny_run.refused(lamina("anatomy", bench / "model"))


# ---------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("empty",)),
        (b" \n\n ", ("empty",)),
        (b"A few words only.", ("too little text", "32 tokens")),
        (b"\xff\xfe\x00 no text at all", ("not a text file", "UTF-8")),
        (None, ("no such file or folder",)),
    ],
)
@pytest.mark.parametrize("option", ["--text", "--heldout"])
def test_a_text_that_is_none(
    thin: Any, tmp_path: Path, option: str, content: bytes | None, words: tuple[str, ...]
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    tiny_run.refused(thin("--keep", "75%", option, path), "text.txt", *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "more", "words"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', (), ("line 2", "not valid JSON")),
        ("a.jsonl", '{"body": "a"}\n', (), ("no column 'text'",)),
        ("a.jsonl", '{"text": 3}\n', (), ("not text",)),
        ("a.parquet", "PAR1 and then nothing", (), ("Parquet",)),
        ("a.safetensors", "", (), ("a.safetensors",)),
        ("a.txt", "words " * 400, ("--length", "0"), ("length", "at least 1")),
        ("a.txt", "words " * 400, ("--sequences", "0"), ("sequences", "at least 1")),
        ("a.txt", "words " * 400, ("--length", "1"), ("length", "predict nothing")),
        ("a.txt", "words " * 400, ("--length", "600"), ("longer than the model's 512", "--length 512")),
        ("a.txt", "words " * 400, ("--seed", "-1"), ("seed", "0 or more")),
    ],
)
def test_texts_of_other_kinds(
    thin: Any, tmp_path: Path, name: str, content: str, more: tuple[str, ...], words: tuple[str, ...]
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    tiny_run.refused(thin("--keep", "75%", "--text", tmp_path / name, *more), *words)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- words on the command line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), ("how much may stay?", "--keep 75%")),
        (("--keep", "0"), ("--keep", "above 0")),
        (("--keep", "150%"), ("--keep", "at most 100%")),
        (("--keep", "-5%"), ("--keep",)),
        (("--keep", "nan"), ("--keep",)),
        (("--keep", "abc"), ("--keep", "75% or 0.75")),
        (("--keep", "75%", "--blocks", "1"), ("one budget at a time", "--keep and --blocks")),
        (("--keep", "75%", "--blocks", "1", "--bytes", "1MB"), ("one budget at a time",)),
        (("--parameters", "many"), ("--parameters", "100M")),
        (("--parameters", "0"), ("--parameters", "not positive")),
        (("--parameters", "inf"), ("--parameters",)),
        (("--parameters", "1e999"), ("--parameters",)),
        (("--bytes", "10XB"), ("--bytes", "200MB")),
        (("--keep", "75%", "--parameters", "1M"), ("one budget at a time", "--keep and --parameters")),
        (("--kv", "100MB"), ("--kv", "at which context", "100MB@32k")),
        (("--kv", "half@32k"), ("--kv", "200MB")),
        (("--kv", "0.5x@0"), ("--kv", "not positive")),
        (("--kv", "2x"), ("--kv", "at most 100%")),
        (("--latency", "0.7x"), ("--latency", "of which work?", "0.7x@decode")),
        (("--latency", "0.7x@training"), ("--latency", "'training' is no work")),
        (("--latency", "fast@decode"), ("--latency", "20ms")),
        (("--latency", "0ms@decode"), ("--latency", "must be positive")),
        (("--keep", "75%", "--kv", "0.5x"), ("several resources", "--recipe mixed")),
        (("--latency", "0.7x@decode"), ("latency", "--recipe mixed")),
        (("--blocks", "-1"), ("--blocks", "negative")),
        (("--blocks", "two"), ("--blocks", "valid integer")),
        (("--keep", "75%", "--keeep", "1"), ("--keeep",)),
        (("--keep", "75%", "--recipe", "finercuts"), ("did you mean finercut?",)),
        (("--keep", "75%", "--recipe", "nowhere.yaml"), ("nowhere.yaml",)),
        (("--keep", "75%", "--dtype", "float8"), ("dtype", "float32")),
        (("--keep", "75%", "--device", "abacus"), ("abacus",)),
        (("--keep", "75%", "--heal", "0"), ("heal", "positive")),
        (("--keep", "75%", "--heal-minutes", "nan"), ("heal", "positive")),
        (("--keep", "75%", "--heal", "5", "--heal-minutes", "1"), ("steps and minutes",)),
    ],
)
def test_words_that_make_no_sense(thin: Any, tmp_path: Path, words: tuple[str, ...], says: tuple[str, ...]) -> None:
    tiny_run.refused(thin(*words), *says)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("site", ["block.99", "block.1.mpl", "layer.3"])
def test_a_site_that_is_not_there(thin: Any, tmp_path: Path, site: str) -> None:
    tiny_run.refused(thin("--keep", "75%", "--protect", site), site, "no such site")
    assert not {"survey.parquet", "plan.yaml", "model"} & {p.name for p in (tmp_path / "run").iterdir()}


def test_a_budget_that_can_not_be_met(thin: Any, tmp_path: Path) -> None:
    tiny_run.refused(thin("--keep", "5%"), "the budget asks to drop", "at most")
    tiny_run.refused(thin("--blocks", "9"), "the budget asks to drop 9 of 4 blocks")
    assert not (tmp_path / "run" / "plan.yaml").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("survey", "{model}", "--measures", "cosin"), ("did you mean cosine",)),
        (("show", "cosin"), ("did you mean cosine",)),
        (("cite", "shortgtp"), ("did you mean shortgpt",)),
        (("cite", "lowest"), ("lamina's own",)),
        (("methods", "--role", "mesure"), ("did you mean measure?",)),
        (("plan", "{tmp}"), ("no run folder",)),
        (("plan", "{tmp}/nowhere"), ("no run folder",)),
        (("apply", "{tmp}"), ("no run folder",)),
        (("heal", "{tmp}", "--steps", "3"), ("no run folder",)),
        (("prove", "{tmp}"), ("no run folder",)),
        (("export", "{tmp}"), ("no run folder",)),
        (("report", "{tmp}/nowhere"), ("no such run folder",)),
        (("report", "{tmp}"), ("not a run folder",)),
        (("thim",), ("thim",)),
        (("thin", "--keep", "75%"), ("which model?",)),
        (("apply",), ("RUN",)),
    ],
)
def test_commands_on_nothing(
    lamina: Any, bench: Path, tmp_path: Path, words: tuple[str, ...], says: tuple[str, ...]
) -> None:
    tiny_run.refused(lamina(*(w.format(model=bench / "model", tmp=tmp_path) for w in words)), *says)
    assert [p.name for p in tmp_path.iterdir()] == []


def test_a_recipe_file(thin: Any, lamina: Any, bench: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for text, words in (
        ("name: default\nbudget: {keep: 0.5}\nbugdet: 1\n", ("unknown key 'bugdet'", "budget")),
        ("name: default\nbudget: {kep: 0.5}\n", ("kep", "did you mean keep?")),
        ("name: finercutt\nbudget: {keep: 0.5}\n", ("did you mean finercut?",)),
        ("name: default\nbudget: {keep: 0.5}\nbudget: {keep: 0.6}\n", ("given twice",)),
        ("lamina: 99\nname: default\nbudget: {keep: 0.5}\n", ("format",)),
        ("- a\n- b\n", ("mapping",)),
        ("name: [", ("not valid",)),
    ):
        path.write_text(text, encoding="utf-8")
        tiny_run.refused(lamina("thin", bench / "model", "--recipe", path), *words)
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def test_an_output_folder_that_is_taken(thin: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine", encoding="utf-8")
    tiny_run.refused(thin("--keep", "75%", out=path), "this is a file")
    tiny_run.refused(thin("--keep", "75%", out=path / "run"), "file")
    assert path.read_text(encoding="utf-8") == "mine"
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / "letter.txt").write_text("mine", encoding="utf-8")
    tiny_run.refused(thin("--keep", "75%", out=folder), "not empty", "--out")
    assert tiny_run.contents(folder) == {"letter.txt": b"mine"}
