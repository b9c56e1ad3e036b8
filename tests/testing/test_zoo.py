"""The zoo: tiny instances of the architectures that transformers, timm and diffusers know."""

import dataclasses
import inspect
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lamina.core.errors import UnsupportedError
from lamina.testing import zoo

SORTS = {
    "llama": {"input_ids"},  # a decoder
    "qwen3_next": {"input_ids"},  # linear and full attention, experts
    "falcon_mamba": {"input_ids"},  # no attention
    "bert": {"input_ids"},
    "t5": {"input_ids", "decoder_input_ids"},
    "vit": {"pixel_values"},
    "whisper": {"input_ids"},
    "llava": {"input_ids", "pixel_values"},
    "swin": {"pixel_values"},
}
"""One of each sort, and its inputs."""
WRITTEN_FOR = {"transformers": "5.23", "diffusers": "0.42"}
"""Versions that the data was written for: others know other types."""


def written_for(library: str) -> bool:
    try:
        return version(library).startswith(WRITTEN_FOR[library])
    except PackageNotFoundError:
        return False


def tensors(out: object) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, dict):
        out = list(out.values())
    return [t for o in out for t in tensors(o)] if isinstance(out, (list, tuple)) else []


@pytest.mark.parametrize("name", SORTS)
def test_builds_and_forwards(name: str) -> None:
    before = torch.get_rng_state()
    one = zoo.build(name)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    two, three = zoo.build(name), zoo.build(name, seed=1)

    weights = dict(two.model.named_parameters())
    assert all(torch.equal(p, weights[n]) for n, p in one.model.named_parameters())
    assert not torch.equal(next(one.model.parameters()), next(three.model.parameters()))
    assert {n for n, v in one.sample.items() if isinstance(v, Tensor)} >= SORTS[name]
    assert all(torch.equal(v, two.sample[n]) for n, v in one.sample.items())
    assert not one.model.training
    assert sum(p.numel() for p in one.model.parameters()) < 3_000_000
    with torch.no_grad():
        first, second = tensors(one.model(**one.sample)), tensors(two.model(**two.sample))
    assert first
    assert all(torch.isfinite(t).all() for t in first)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_lists_of_names() -> None:
    causal, others = zoo.names(causal=True), zoo.names(causal=False)
    assert set(causal) | set(others) == set(zoo.names())
    assert not set(causal) & set(others)
    assert "llama" in causal
    assert "t5" in others
    assert zoo.build("llama").causal
    assert not zoo.build("vit").causal
    assert all(n.startswith("diffusers/") for n in zoo.names("diffusers"))
    with pytest.raises(UnsupportedError, match="did you mean timm"):
        zoo.names("timms")


def test_refuses_with_a_reason() -> None:
    with pytest.raises(UnsupportedError, match="did you mean llama"):
        zoo.build("lama")
    with pytest.raises(UnsupportedError, match="dinat: needs the package natten"):
        zoo.build("dinat")


def test_kinds_of_layers_stay() -> None:
    tiny = zoo.config("kimi_linear")
    assert len(tiny.layer_types) == tiny.num_hidden_layers == 4
    assert set(tiny.layer_types) == {"linear_attention", "full_attention"}
    assert set(tiny.mlp_layer_types) == {"dense", "sparse"}
    assert len(set(zoo.config("nemotron_h").layers_block_type)) > 2


def test_every_tower_runs() -> None:
    specimen = zoo.build("qwen2_vl")
    ran = set()
    for name, module in specimen.model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: ran.add(name))
    with torch.no_grad():
        specimen.model(**specimen.sample)
    stacks = [n for n, m in specimen.model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    assert len(stacks) == 2
    assert all(f"{s}.{i}" in ran for s in stacks for i in range(4))


def test_nothing_is_silent() -> None:
    """Gates that a library starts at zero, and scales that it starts near it, are filled."""
    model = zoo.build("mllama").model
    gates = [p for n, p in model.named_parameters() if n.endswith(("attn_gate", "mlp_gate"))]
    assert gates
    assert all(p.abs().min() > 0.05 for p in gates)


@pytest.mark.skipif(not written_for("transformers"), reason="the data was written for another transformers")
def test_data_names_known_types_and_fields() -> None:
    from transformers import CONFIG_MAPPING

    entries = zoo.data()["transformers"]
    assert set(entries) <= set(zoo.names())
    wrong = []
    for name, entry in entries.items():
        assert set(entry) <= {"config", "start", "class", "sample", "towers", "note", "skip"}, name
        kind = CONFIG_MAPPING[name]
        known = {f.name for f in dataclasses.fields(kind)} | set(kind.attribute_map)
        file = Path(inspect.getfile(kind))
        beside = [file, file.with_name(file.name.replace("configuration_", "modeling_"))]
        said = " ".join(f.read_text(encoding="utf-8") for f in beside if f.exists())
        fields = set(entry.get("config", {})) | set(entry.get("start", {}))
        wrong += [f"{name}: {f}" for f in fields - known if not re.search(rf"\b{f.removeprefix('swa_')}\b", said)]
    assert not wrong


@pytest.mark.skipif(not written_for("diffusers"), reason="the data was written for another diffusers")
def test_data_names_known_classes_of_diffusers() -> None:
    import diffusers.models

    for name, entry in zoo.data()["diffusers"].items():
        known = inspect.signature(getattr(diffusers.models, name).__init__).parameters
        assert set(entry.get("args", {})) <= set(known), name


@pytest.mark.coverage
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", zoo.LIBRARIES)
def test_everything_else_builds(library: str) -> None:
    if library in WRITTEN_FOR and not written_for(library):
        pytest.skip(f"the data was written for another {library}")
    failed = []
    for name in zoo.names(library):
        try:
            specimen = zoo.build(name)
        except UnsupportedError as error:
            skipped = "skip" in (zoo.data()[library].get(name.removeprefix(f"{library}/")) or {})
            if not skipped and "needs the package" not in str(error):
                failed.append(str(error))
            continue
        try:
            with torch.no_grad():
                out = tensors(specimen.model(**specimen.sample))
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
            continue
        if not out or any(t.isnan().any() for t in out):
            failed.append(f"{name}: numbers that are none")
        if sum(p.numel() for p in specimen.model.parameters()) >= 5_000_000:  # one has a width in its code
            failed.append(f"{name}: too large")
    assert not failed, "\n".join(failed)
