"""ONNX files run by ONNX Runtime: the model's outputs, at other lengths than were traced; anything else is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lamina.core.errors import InputError, ReloadError
from lamina.exporters import onnx
from lamina.exporters.onnx import Onnx
from lamina.testing.models import text
from lamina.testing.tools import thinned, tokenizer

needs = pytest.mark.skipif(bool(onnx.missing()), reason=f"not installed: {', '.join(onnx.missing())}")


@needs
@pytest.mark.slow
def test_a_causal_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    bench, _, receipt = thinned(vocab_size=300)
    run = SimpleNamespace(receipts=(receipt,), tokenizer=tokenizer(), sample=text(2, 12))
    files = Onnx().export(bench.model, run, tmp_path / "out")
    assert {"model.onnx", "model.onnx.data", "tokenizer.json"} <= {f.name for f in files}
    assert str(Path(torch.__file__).parent).encode() not in (tmp_path / "out" / "model.onnx").read_bytes()
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    ids = text(5, 29)
    mask = torch.ones_like(ids)
    mask[2, :7] = 0
    (found,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    with torch.no_grad():
        due = bench.model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(torch.from_numpy(found)[mask.bool()], due[mask.bool()], rtol=0, atol=1e-4)
    other = onnx._traced(bench.model, ("input_ids", "attention_mask"))
    torch.nn.init.normal_(next(m for m in other.modules() if isinstance(m, torch.nn.Linear)).weight)
    with pytest.raises(ReloadError, match="outputs differ by"), torch.no_grad():
        onnx._compared(other, {"input_ids": ids, "attention_mask": mask}, tmp_path / "out" / "model.onnx")


@needs
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_encoders_and_vision_models(kind: str, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel, ViTConfig, ViTModel

    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    sample: dict[str, Any]
    if kind == "bert":
        model, sample = BertModel(BertConfig(vocab_size=99, **small)).eval(), {"input_ids": text(2, 9)}
    else:
        model = ViTModel(ViTConfig(image_size=16, patch_size=4, **small)).eval()
        sample = {"pixel_values": torch.randn(2, 3, 16, 16)}
    files = Onnx().export(model, SimpleNamespace(receipts=(), sample=sample), tmp_path / "out")
    assert "model.onnx" in {f.name for f in files}


def test_missing_libraries_are_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "NEEDS", ("onnx_that_nobody_has",))
    with pytest.raises(InputError, match=r"onnx_that_nobody_has not installed.*lamina\[onnx\]"):
        Onnx().export(thinned()[0].model, SimpleNamespace(receipts=()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_other_lengths_are_compared_than_were_traced() -> None:
    inputs = {"input_ids": text(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    found = onnx._reshaped(inputs)
    assert {tuple(v.shape) for v in found.values()} == {(3, 11)}
    assert found["attention_mask"].sum() == 3 * 11 - 3
    assert inputs["attention_mask"].sum() == 24
