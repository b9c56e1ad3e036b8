"""Tasks for models that see: a linear probe on a backbone's vectors, and the accuracy of a trained head."""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.core.errors import InputError, UnsupportedError
from lamina.evaluators.tasks._item import Marks, Subject, task
from lamina.evaluators.tasks._probe import probed

Array = NDArray[np.float64]
Pictures = NDArray[np.uint8]
FITTED = 500
"""Pictures that the probe is fitted on."""
SIDE = 112
"""Pixels to which a picture of 32 is brought: a multiple of the usual patches, 14 and 16."""
ROWS = 16
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, per channel of values from 0 to 1: for a backbone whose folder names none."""


@task("cifar10", capability="pictures", of="vision", data="bigbench", items=9500)
def cifar10(subject: Subject) -> Marks:
    """What a picture of CIFAR-10 shows, of ten things: a logistic probe on a backbone's vectors."""
    from lamina.lab.datasets import dataset

    text = (dataset("bigbench") / "cifar10_classification/base64/task.json").read_text(encoding="utf-8")
    examples = json.loads(text)["examples"]
    labels = [max(e["target_scores"], key=e["target_scores"].__getitem__) for e in examples]
    keys = [hashlib.sha256(e["input"].encode()).hexdigest()[:16] for e in examples]
    return probed(
        "cifar10",
        subject,
        labels,
        lambda chosen: vectors(subject, np.stack([opened(examples[i]["input"]) for i in chosen]), "cifar10"),
        fitted=FITTED,
        keys=keys,
        how="logistic probe on the first and the mean of the other last vectors",
    )


@task("fashion-mnist", capability="pictures", of="vision", data="fashion-mnist", items=10_000, groups=())
def fashion_mnist(subject: Subject) -> Marks:
    """Which of ten garments a picture of Fashion-MNIST shows, by the model's own trained head of ten classes."""
    from lamina.lab.datasets import dataset

    if getattr(getattr(subject.model, "config", None), "num_labels", 0) != 10:
        raise UnsupportedError("this task is for a model with a trained head of ten classes", where="fashion-mnist")
    folder = dataset("fashion-mnist")
    pictures = idx(gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes()))
    labels = idx(gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes()))
    chosen = np.random.default_rng(subject.seed).permutation(len(labels))[: subject.items]
    guessed = classes(subject, pictures[chosen], "fashion-mnist")
    return Marks.of(guessed == labels[chosen], chosen.tolist(), chance=0.1, how="the model's own head")


def opened(text: str) -> Pictures:
    """The pixels [height, width, 3] of a picture in base64. Raises InputError where Pillow is missing."""
    try:
        pillow: Any = importlib.import_module("PIL.Image")
    except ImportError:
        raise InputError("Pillow is missing", where="cifar10", hint="pip install 'lamina[probes]'") from None
    return np.asarray(pillow.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


def idx(data: bytes) -> Pictures:
    """An array of bytes in the IDX format: its number of axes in byte 3, then each size, big-endian."""
    sizes = np.frombuffer(data, ">u4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(sizes)


def vectors(subject: Subject, pictures: Pictures, name: str) -> Array:
    """First vector and mean of the others, float64 [pictures, 2 × width], of pictures [pictures, height, width, 3].

    A model without a sequence ([width, height, width] per picture) gives the mean over its places.
    """
    model: Any = getattr(subject.model, "base_model", subject.model)
    side, options = _taken(model, pictures[:1], subject.path)
    found: list[Array] = []
    for start in range(0, len(pictures), ROWS):
        rows = pictures[start : start + ROWS]
        out = _seen(model, prepared(rows, side, _scale(subject.path)), options).last_hidden_state.double()
        parts = [out.mean((2, 3))] if out.ndim == 4 else [out[:, 0], out[:, 1:].mean(1)]
        found.append(np.concatenate([p.cpu().numpy() for p in parts], 1))
        subject.progress(name, start + len(rows), len(pictures))
    return np.concatenate(found)


def classes(subject: Subject, pictures: Pictures, name: str) -> NDArray[np.int64]:
    """The class that the model's own head gives to each picture [pictures, height, width].

    Values go in from 0 to 1, with what the folder's preprocessor_config.json takes out of them, if it has one.
    """
    config: Any = subject.model.config
    side, found = config.image_size, list[NDArray[np.int64]]()
    side = side if isinstance(side, int) else max(side)
    for start in range(0, len(pictures), ROWS):
        rows = np.repeat(pictures[start : start + ROWS, ..., None], getattr(config, "num_channels", 3), -1)
        out = _seen(subject.model, prepared(rows, side, _scale(subject.path, ((0.0,), (1.0,)))), {})
        found.append(out.logits.argmax(-1).cpu().numpy())
        subject.progress(name, start + len(rows), len(pictures))
    return np.concatenate(found)


def prepared(pictures: Pictures, side: int, scale: tuple[Sequence[float], Sequence[float]]) -> Any:
    """Pixels [pictures, height, width, channels] as a tensor [pictures, channels, side, side], scaled per channel.

    Bicubic where the size differs.
    """
    import torch

    values = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255
    if values.shape[-2:] != (side, side):
        resize = torch.nn.functional.interpolate
        values = resize(values, (side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    mean, deviation = (torch.tensor(list(s)).view(1, -1, 1, 1) for s in scale)
    return (values - mean) / deviation


def _scale(
    path: Path | None, otherwise: tuple[Sequence[float], Sequence[float]] = (MEAN, DEVIATION)
) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation per channel, as the model's folder names them."""
    file = path / "preprocessor_config.json" if path is not None and path.is_dir() else None
    if file is None or not file.is_file():
        return otherwise
    found = json.loads(file.read_text(encoding="utf-8"))
    mean, deviation = found.get("image_mean", otherwise[0]), found.get("image_std", otherwise[1])
    return mean, deviation


def _taken(model: Any, picture: Pictures, path: Path | None) -> tuple[int, dict[str, Any]]:
    """The side that the model takes, and the option that lets it: small pictures, else those it was built for."""
    built = getattr(getattr(model, "config", None), "image_size", SIDE)
    built = built if isinstance(built, int) else max(built)
    for side, options in ((SIDE, {}), (SIDE, {"interpolate_pos_encoding": True}), (built, {})):
        try:
            out = _seen(model, prepared(picture, side, _scale(path)), options)
        except (ValueError, RuntimeError, TypeError):
            continue
        if getattr(out, "last_hidden_state", None) is not None:
            return side, options
    raise UnsupportedError(f"{type(model).__name__} gives no vectors of a picture of {SIDE} or {built} pixels")


def _seen(model: Any, values: Any, options: dict[str, Any]) -> Any:
    import torch

    first = next(model.parameters())
    with torch.inference_mode():
        return model(pixel_values=values.to(first.device, first.dtype), **options)
