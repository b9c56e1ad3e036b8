"""ONNX for ONNX Runtime: the forward of whole texts, written by torch, run and compared before it is published."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lamina.core.errors import InputError, ReloadError, UnsupportedError
from lamina.core.files import atomic
from lamina.core.registry import exporter
from lamina.exporters._problems import Problem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lamina.core.documents import Receipt

TOLERANCE = 1e-4
"""Largest difference of any output over the largest output, in float32."""
NEEDS = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18
NAMES = ("logits", "last_hidden_state")
"""The output that is written: the first of these that the model gives."""


@exporter("onnx")
@dataclass(frozen=True, kw_only=True)
class Onnx:
    """Write model.onnx in float32, without a cache, whose outputs ONNX Runtime has given as the model gives them."""

    tells: ClassVar[bool] = False
    """Whether `check` tells more than that the structure can be rebuilt."""

    def check(self, receipts: Sequence[Receipt], model: nn.Module | None = None) -> list[Problem]:
        """What can't be rebuilt; whether torch can write the model shows when it is tried."""
        from lamina.exporters.hf import HuggingFace

        return HuggingFace().check(receipts)

    def export(self, model: nn.Module, run: Any, to: Path, /) -> list[Path]:
        """Write the folder `to`: model.onnx (beside it model.onnx.data) and the tokenizer; give its files.

        `run` may have a `sample` of inputs by name, or of token ids [batch, tokens]. Raises InputError where the
        libraries are missing, UnsupportedError where torch can't write the model, and ReloadError where ONNX Runtime
        gives other outputs.
        """
        if absent := missing():
            raise InputError(f"{', '.join(absent)} not installed", where="onnx", hint="pip install 'lamina[onnx]'")
        found = getattr(run, "receipts", ())
        for problem in self.check(tuple(getattr(found, "receipts", found))):
            raise problem.error()
        to = Path(to)
        with atomic(to) as draft:
            draft.mkdir()
            _write(model, _inputs(model, getattr(run, "sample", None)), draft / "model.onnx")
            tokenizer = getattr(run, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(draft)
        return sorted(p for p in to.rglob("*") if p.is_file())


def missing() -> list[str]:
    """The libraries that this exporter needs and that are not installed."""
    return [name for name in NEEDS if importlib.util.find_spec(name) is None]


def _inputs(model: Any, sample: Any) -> dict[str, Tensor]:
    """The inputs of one forward by name: at least two rows; of a text with its mask."""
    import torch

    if isinstance(sample, torch.Tensor):
        sample = {"input_ids": sample}
    name = getattr(model, "main_input_name", "input_ids")
    if sample is None and name == "input_ids":
        rows = int(model.get_input_embeddings().weight.shape[0])
        sample = {"input_ids": torch.arange(1, 25).reshape(2, 12) * rows // 26}
    if sample is None:
        raise InputError(f"the model reads {name}, and there is no sample of it", where="onnx")
    ids = sample.get("input_ids")
    if ids is not None and "attention_mask" not in sample:
        sample = {**sample, "attention_mask": torch.ones_like(ids)}
    return {k: (torch.cat((v, v)) if len(v) == 1 else v).cpu() for k, v in sample.items()}


def _write(model: Any, inputs: Mapping[str, Tensor], path: Path) -> float:
    """Write the file, run it on other shapes than it was traced with, and give the relative difference."""
    import torch

    traced = _traced(model, tuple(inputs))
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    shapes = {k: {0: batch, 1: tokens} if v.ndim == 2 else {0: batch} for k, v in inputs.items()}
    with torch.no_grad(), _silent():
        try:
            program: Any = torch.onnx.export(
                traced, tuple(inputs.values()), input_names=list(inputs), output_names=[traced.output],
                dynamic_shapes={"values": tuple(shapes.values())}, dynamo=True, opset_version=OPSET, verbose=False,
            )  # fmt: skip
            for node in program.model.graph.all_nodes():
                node.metadata_props.clear()  # where each was called from, on this machine
            program.save(str(path), external_data=True)
        except OSError as error:
            raise InputError(f"can't write: {error.strerror or error}", where=path) from error
        except Exception as error:
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UnsupportedError(f"torch can't write it as ONNX: {line[:200]}", where=type(model).__name__) from error
        return _compared(traced, _reshaped(inputs), path)


def _traced(model: Any, names: tuple[str, ...]) -> Any:
    """A float32 copy behind a forward that takes inputs in this order, keeps no cache and gives one tensor."""
    import copy

    import torch

    class Traced(torch.nn.Module):
        output = ""

        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(model).cpu().float().eval()
            self.cached = "use_cache" in vars(getattr(model, "config", object()))

        def forward(self, *values: Any) -> Any:
            out = self.inner(**dict(zip(names, values, strict=True)), **({"use_cache": False} if self.cached else {}))
            return next(getattr(out, n) for n in NAMES if getattr(out, n, None) is not None)

    traced = Traced()
    traced.output = "logits" if getattr(model, "can_generate", lambda: False)() else NAMES[-1]
    return traced


def _reshaped(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Other lengths than were traced: three rows, a token less, and a row that is padded on the left."""
    import torch

    found = {k: torch.cat((v, v[:1]))[:3] for k, v in inputs.items()}
    if "input_ids" in found:
        found = {k: v[:, :-1].clone() if v.ndim == 2 else v for k, v in found.items()}
        found["attention_mask"][-1, :3] = 0
    return found


def _compared(traced: Any, inputs: Mapping[str, Tensor], path: Path) -> float:
    """The largest difference over the largest output, where the mask is 1; ReloadError above the tolerance."""
    import torch

    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    theirs = torch.from_numpy(session.run(None, {k: v.numpy() for k, v in inputs.items()})[0])
    ours = traced(*inputs.values())
    if theirs.shape != ours.shape:
        raise ReloadError(f"ONNX Runtime gives {list(theirs.shape)}, the model {list(ours.shape)}", where=path.name)
    if (mask := inputs.get("attention_mask")) is not None and ours.shape[:2] == mask.shape:
        ours, theirs = ours[mask.bool()], theirs[mask.bool()]
    apart = float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-12))
    if not apart <= TOLERANCE:
        raise ReloadError(
            f"ONNX Runtime's outputs differ by {apart:.1e} of the largest (at most {TOLERANCE:.0e})", where=path.name
        )
    return apart


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the libraries' warnings and notes."""
    known = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [log.level for log in known]
    for log in known:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(known, levels, strict=True):
            log.setLevel(level)
