"""llama.cpp's own tokens against the model's logits: equal models pass, and a file of other numbers does not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lamina.exporters import _gguf_run as child
from lamina.exporters.gguf import Gguf
from lamina.testing.models import text
from lamina.testing.tools import thinned, tokenizer


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    if not child.available():
        pytest.skip("llama.cpp's wheel is not installed (pip install xllamacpp)")
    bench, _, receipt = thinned(vocab_size=300)
    to = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    Gguf().export(bench.model, SimpleNamespace(tokenizer=tokenizer(), receipts=(receipt,)), to)
    return to, bench.model


def test_the_file_continues_as_the_model_does(written: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = written
    monkeypatch.chdir(path.parent)
    assert child.run_check(Path(path.name), model, text(2, 12), rounded=False) == "", "a path from here"
    torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.weight)
    wrong = child.run_check(path, model, text(2, 12), rounded=False)
    assert wrong.startswith("llama.cpp continues otherwise: token ")


def test_a_file_that_llama_cpp_does_not_load(written: tuple[Path, Any], tmp_path: Path) -> None:
    path, model = written
    (tmp_path / "half.gguf").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "llama.cpp does not run it" in child.run_check(tmp_path / "half.gguf", model, text(1, 8), rounded=False)


def test_no_answer_in_time(written: tuple[Path, Any]) -> None:
    with pytest.raises(TimeoutError, match=r"no answer from llama\.cpp"):
        child.run_check(*written, text(1, 8), rounded=False, timeout=0.01)


def test_near_ties_are_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token a thousandth of the largest logit behind the best one passes; one a tenth behind does not."""

    class Flat(torch.nn.Linear):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:  # type: ignore[override]
            logits = torch.zeros(*input_ids.shape, 4)
            logits[..., 0], logits[..., 1], logits[..., 2] = 10.0, 9.99, 9.0
            return SimpleNamespace(logits=logits)

    model = Flat(1, 1)
    assert child._held_against(model, [[0, 0]], [[0, 1, 0]], child.TIE) == ""
    assert "token 2 of row 0" in child._held_against(model, [[0, 0]], [[1, 2, 0]], child.TIE)
    assert child._held_against(model, [[0, 0]], [[1, 2, 0]], child.COARSE + 1e-6) == ""
    assert child._held_against(model, [[0, 0], [0, 0]], [[], [0]], child.TIE) == ""
    with pytest.raises(TimeoutError, match="at once"):
        child._held_against(model, [[0, 0]], [[]], child.TIE)
