"""`compare`: two models of any kind on the same items, marks kept, what makes no sense refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from planted_tasks import Desk
from transformers import BertConfig, BertModel

import lamina
from lamina.core.documents import EvidenceFile
from lamina.core.errors import InputError, LaminaError, UnsupportedError
from lamina.evaluators.tasks._evidence import TASK
from lamina.testing.models import tiny
from lamina.testing.tools import tokenizer


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    table = Desk(monkeypatch)
    table.add("kept", 0.0, of=("decoder", "encoder"))
    table.add("lost", 0.4, "knowledge", of=("decoder", "encoder"))
    return table


def made(name: str, blocks: int) -> Any:
    if name != "bert":
        return tiny(name, num_hidden_layers=blocks)
    sizes: Any = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    return BertModel(BertConfig(num_hidden_layers=blocks, **sizes))


def pair(name: str, desk: Desk) -> tuple[Any, Any]:
    """A model and one of fewer blocks, and the number of tensors that tells them apart."""
    dense, thinned = made(name, 4), made(name, 2)
    desk.most = len(list(thinned.parameters()))
    assert len(list(dense.parameters())) > desk.most
    return dense, thinned


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_models_of_every_kind_are_compared(name: str, desk: Desk) -> None:
    dense, thinned = pair(name, desk)
    found = lamina.compare(dense, thinned, items=200, tokenizer=tokenizer())
    assert desk.calls == ["lost dense", "lost thinned", "kept dense", "kept thinned"]
    rows = {e.name.removeprefix(TASK): e for e in found.evidence if e.of == "difference"}
    assert rows["kept"].value == 0
    assert rows["lost"].value < -0.2
    assert rows["lost"].p is not None
    assert rows["lost"].p < 0.001
    assert any("worse in 1 of 2 tasks (lost)" in line for line in found.notes)
    assert "lost" in found._repr_html_()  # type: ignore[attr-defined]


def test_modules_are_left_as_they_were(desk: Desk) -> None:
    dense, thinned = pair("llama", desk)
    dense.train()
    thinned.eval()
    lamina.compare(dense, thinned, items=20, tokenizer=tokenizer())
    assert dense.training
    assert not thinned.training


def test_what_was_cut_off_goes_on(desk: Desk, tmp_path: Path) -> None:
    dense, thinned = pair("llama", desk)
    asked: dict[str, Any] = {"items": 50, "tokenizer": tokenizer(), "out": tmp_path}
    desk.fails.add("kept thinned")
    with pytest.raises(KeyboardInterrupt):
        lamina.compare(dense, thinned, **asked)
    assert not (tmp_path / "evidence.json").exists()
    desk.fails.clear()
    found = lamina.compare(dense, thinned, **asked)
    assert desk.calls == ["lost dense", "lost thinned", "kept dense", "kept thinned", "kept thinned"]
    assert EvidenceFile.load(tmp_path / "evidence.json") == found
    lamina.compare(dense, thinned, **asked)
    assert len(desk.calls) == 5
    lamina.compare(dense, tiny("llama", num_hidden_layers=2, seed=1), **asked)
    assert desk.calls[5:] == ["lost thinned", "kept thinned"], "the dense model's marks are kept"
    lamina.compare(dense, thinned, **{**asked, "seed": 1})
    assert len(desk.calls) == 11


@pytest.mark.parametrize(
    ("thinned", "options", "error", "said"),
    [
        ("bert", {}, UnsupportedError, "the dense model is of the kind decoder, the thinned one of the kind encoder"),
        ("llama", {"items": 1}, InputError, "at least 2 items"),
        ("llama", {"tasks": "keept"}, InputError, "no task named 'keept'"),
    ],
)
def test_what_makes_no_sense_is_refused(
    thinned: str, options: dict[str, Any], error: type[LaminaError], said: str, desk: Desk
) -> None:
    with pytest.raises(error, match=said):
        lamina.compare(made("llama", 4), made(thinned, 4), tokenizer=tokenizer(), **options)
    assert desk.calls == []


def test_a_run_keeps_its_evidence(desk: Desk, tmp_path: Path) -> None:
    for name in ("recipe.yaml", "evidence.json"):
        (tmp_path / name).write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="holds a run"):
        lamina.compare(*pair("llama", desk), tokenizer=tokenizer(), out=tmp_path)
    assert desk.calls == []
    assert (tmp_path / "evidence.json").read_text(encoding="utf-8") == "mine"


def test_the_command_compares_folders(desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lamina.cli import main

    for model, name in zip(pair("bert", desk), ("dense", "thinned"), strict=True):
        model.save_pretrained(tmp_path / name)
    told = [str(tmp_path / "dense"), str(tmp_path / "thinned"), "--items", "100", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        main(["compare", *told])
    assert not end.value.code
    out = capsys.readouterr().out
    assert "lost" in out
    assert "worse in 1 of 2 tasks (lost)" in out
    assert (tmp_path / "out" / "evidence.json").is_file()
