"""Pictures: how they come to a model, and what is marked."""

from __future__ import annotations

import base64
import gzip
import io
import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_kinds import kind
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from lamina.core.errors import UnsupportedError
from lamina.evaluators.tasks import vision
from lamina.evaluators.tasks._item import Subject, tasks
from lamina.lab import datasets

COLOURS = {"airplane": (30, 60, 200), "frog": (20, 180, 40), "truck": (200, 30, 30)}


def png(pixels: Any) -> str:
    to = io.BytesIO()
    Image.fromarray(pixels).save(to, "PNG")
    return base64.b64encode(to.getvalue()).decode()


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sixty pictures of three things, told by their colour, in the order of their labels."""
    rng, rows = np.random.default_rng(0), []
    for label, colour in COLOURS.items():
        for _ in range(20):
            pixels = np.clip(rng.normal(colour, 30, (32, 32, 3)), 0, 255).astype(np.uint8)
            rows.append({"input": png(pixels), "target_scores": {name: int(name == label) for name in COLOURS}})
    folder = tmp_path / "cifar10_classification" / "base64"
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps({"examples": rows}))
    monkeypatch.setattr(datasets, "dataset", lambda name: tmp_path)
    monkeypatch.setattr(vision, "SIDE", 16)
    monkeypatch.setattr(vision, "FITTED", 30)
    return tmp_path


def test_things_are_told_where_colours_tell_them(pictures: Path) -> None:
    model, _ = kind("vit")
    marks = tasks()["cifar10"].score(Subject(model=model, items=20))
    assert marks.values.mean() > 0.9
    assert len(set(marks.keys)) == 20


def test_vectors_are_those_of_each_picture_alone() -> None:
    model, _ = kind("vit")
    shown = np.random.default_rng(0).integers(0, 256, (18, 16, 16, 3), np.uint8)
    found = vision.vectors(Subject(model=model), shown, "")
    built = model.config.image_size
    assert built == 16
    for row, picture in zip(found, shown, strict=True):
        values = vision.prepared(picture[None], 112, (vision.MEAN, vision.DEVIATION))
        with torch.no_grad():
            states = model(pixel_values=values, interpolate_pos_encoding=True).last_hidden_state[0].double()
        np.testing.assert_allclose(row, torch.cat([states[0], states[1:].mean(0)]).numpy(), atol=1e-4)


@pytest.mark.parametrize("side", [16, 112])
def test_a_model_of_one_size_gets_its_own(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes pictures of 16 pixels alone, and gives vectors by place, without a first one."""

    class Fixed(nn.Module):
        config = SimpleNamespace(image_size=[16, 16])

        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 5, 4, 4)

        def forward(self, pixel_values: Tensor) -> Any:
            if pixel_values.shape[-1] != 16:
                raise ValueError("not my size")
            return SimpleNamespace(last_hidden_state=self.convolution(pixel_values))

    monkeypatch.setattr(vision, "SIDE", side)
    model, shown = Fixed(), np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    found = vision.vectors(Subject(model=model), shown, "")
    with torch.no_grad():
        expected = model.convolution(vision.prepared(shown, 16, (vision.MEAN, vision.DEVIATION))).mean((2, 3))
    np.testing.assert_allclose(found, expected.double().numpy(), atol=1e-6)


def test_a_model_that_takes_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UnsupportedError, match="Linear gives no vectors"):
        vision.vectors(Subject(model=model), np.zeros((1, 8, 8, 3), np.uint8), "")


def test_prepared_pixel_by_pixel() -> None:
    shown = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    found = vision.prepared(shown, 4, ((0.1, 0.2, 0.3), (1.0, 2.0, 4.0)))
    for n in range(2):
        for channel, (mean, deviation) in enumerate([(0.1, 1.0), (0.2, 2.0), (0.3, 4.0)]):
            expected = (shown[n, :, :, channel] / 255 - mean) / deviation
            np.testing.assert_allclose(found[n, channel].numpy(), expected, atol=1e-6)


def test_larger_pictures_keep_their_colour() -> None:
    found = vision.prepared(np.full((1, 8, 8, 3), 51, np.uint8), 20, ((0.0,), (1.0,)))
    assert found.shape == (1, 3, 20, 20)
    np.testing.assert_allclose(found.numpy(), 0.2, atol=1e-5)


def packed(array: Any) -> bytes:
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


@pytest.fixture
def garments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two hundred pictures, each of one brightness: a tenth of its class."""
    labels = np.random.default_rng(0).integers(0, 10, 200).astype(np.uint8)
    shades = np.broadcast_to((labels * 25.5).round().astype(np.uint8)[:, None, None], (200, 28, 28))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(packed(np.ascontiguousarray(shades)))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(packed(labels))
    monkeypatch.setattr(datasets, "dataset", lambda name: tmp_path)
    return tmp_path


class Bright(nn.Module):
    """Its class is ten times the brightness."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_labels=10, image_size=28, num_channels=1)
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, pixel_values: Tensor) -> Any:
        assert pixel_values.shape[1:] == (1, 28, 28)
        level = pixel_values.mean((1, 2, 3), keepdim=False) * self.scale
        return SimpleNamespace(logits=-(level[:, None] - torch.arange(10)).abs())


def test_a_head_that_knows(garments: Path, tmp_path: Path) -> None:
    task = tasks()["fashion-mnist"]
    marks = task.score(Subject(model=Bright(), items=50))
    assert marks.values.tolist() == [1.0] * 50
    assert marks.chance == 0.1
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5], "image_std": [0.5]}))
    assert task.score(Subject(model=Bright(), items=50, path=tmp_path)).values.mean() < 0.9


def test_a_real_head_runs_and_another_is_refused(garments: Path) -> None:
    small: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads: dict[str, Any] = {"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "num_channels": 1}
    model = ViTForImageClassification(ViTConfig(**small, **heads, num_labels=10)).eval()
    marks = tasks()["fashion-mnist"].score(Subject(model=model, items=60))
    assert set(marks.values.tolist()) <= {0.0, 1.0}
    with pytest.raises(UnsupportedError, match="head of ten classes"):
        tasks()["fashion-mnist"].score(Subject(model=kind("vit")[0]))


def test_idx() -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    assert (vision.idx(gzip.decompress(packed(array))) == array).all()
