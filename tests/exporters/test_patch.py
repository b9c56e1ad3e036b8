"""Patches: base and patch make the thinned model bit for bit, whatever was done; and nothing else makes anything."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lamina.core.documents import Receipt, Step
from lamina.core.errors import InputError
from lamina.core.registry import HEALERS, REWRITES
from lamina.exporters import patch
from lamina.exporters.patch import FILE, TENSORS, Patch, applied, mark_of, read
from lamina.lab import Lab
from lamina.testing.models import text, tiny

NEURONS, GROUPS = "block.1.mlp.neuron", "block.2.attention.kv_group"
DROP = Step(rewrite="drop", sites=("block.1.attention", "block.2"))
STEPS: dict[str, tuple[Step, ...]] = {
    "nothing": (),
    "drop": (DROP,),
    "refit": (
        Step(rewrite="refit", sites=("block.1.mlp", "block.3.mlp"), options={"around": ["block.2"]}),
        Step(rewrite="drop", sites=("block.2",)),
    ),
    "narrow": (Step(rewrite="narrow", sites=(NEURONS, GROUPS), options={"gone": {NEURONS: [3, 40], GROUPS: [0]}}),),
    "narrow, refitted": (Step(rewrite="narrow", sites=(NEURONS,), options={"gone": {NEURONS: [1, 2]}, "refit": 0.1}),),
    "round": (Step(rewrite="round", sites=("block.0.mlp.up_proj", "block.3.mlp.down_proj"), options={"type": "Q4_0"}),),
    "svd": (Step(rewrite="svd", sites=("block.0.mlp.up_proj",), options={"rank": 4}),),
    "share": (Step(rewrite="share", sites=("block.0.attention", "block.3.attention")),),
    "replace": (Step(rewrite="replace", sites=("block.2.mlp",), options={"by": "linear"}),),
}
FEW = {"nothing": 0, "drop": 0, "narrow": 0, "refit": 2, "narrow, refitted": 1, "round": 2}
"""How many tensors a patch holds; of the others, some."""


def done(steps: tuple[Step, ...], **changes: Any) -> tuple[Any, Any, tuple[Receipt, ...]]:
    """A tiny model, what the steps make of a copy, and the receipts."""
    dense: Any = tiny("llama", **changes)
    model = copy.deepcopy(dense)
    lab = Lab(model, text(8, 16))
    return dense, model, tuple(REWRITES.make(s.rewrite, _own(s)).apply(s, lab) for s in steps)


def _own(step: Step) -> dict[str, Any]:
    return {k: v for k, v in step.options.items() if k in ("refit", "by")}


def written(folder: Path, steps: tuple[Step, ...], **changes: Any) -> tuple[Any, Any]:
    """The dense and the thinned model of the patch that is now in `folder`."""
    dense, model, receipts = done(steps, **changes)
    Patch().export(model, SimpleNamespace(receipts=receipts, dense=dense, name="tiny"), folder)
    return dense, model


def same(one: Any, other: Any) -> None:
    """Every tensor bit for bit, the same ties, the same config."""
    a, b = one.state_dict(), other.state_dict()
    assert set(a) == set(b)
    assert [k for k in a if a[k].dtype != b[k].dtype or not torch.equal(a[k], b[k])] == []
    assert sum(1 for _ in one.parameters()) == sum(1 for _ in other.parameters())
    assert one.config.to_dict() == other.config.to_dict()


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("case", STEPS)
def test_base_and_patch_make_the_thinned_model(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tmp_path / "patch"
    dense: Any = tiny("llama").to(dtype)
    model = copy.deepcopy(dense)
    lab = Lab(model, text(8, 16))
    receipts = tuple(REWRITES.make(s.rewrite, _own(s)).apply(s, lab) for s in STEPS[case])
    files = Patch().export(model, SimpleNamespace(receipts=receipts, dense=dense, name="tiny"), folder)
    assert sorted(f.name for f in files) == [TENSORS, FILE]
    again = applied(copy.deepcopy(dense), read(folder), folder, "base")
    same(again, model)
    ids = text(2, 12)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    held = load_file(folder / TENSORS)
    assert len(held) == FEW[case] if case in FEW else 0 < len(held) < len(model.state_dict())
    assert read(folder).changed == len(held)


def test_a_healed_model(tmp_path: Path) -> None:
    dense, model, receipts = done((DROP,), tie_word_embeddings=True)
    lab = Lab(model, text(8, 16))
    HEALERS.make("lora").heal(lab, teacher=dense, steps=3, minutes=None, state_dir=tmp_path / "state")
    folder = tmp_path / "patch"
    Patch().export(model, SimpleNamespace(receipts=receipts, dense=dense), folder)
    assert len(load_file(folder / TENSORS)) > 0
    same(applied(copy.deepcopy(dense), read(folder), folder, "base"), model)


def test_a_patch_of_drops_is_a_few_kilobytes(tmp_path: Path) -> None:
    written(tmp_path / "patch", (DROP,))
    assert sum(f.stat().st_size for f in (tmp_path / "patch").iterdir()) < 4096


def test_the_base_is_left_alone_by_an_export(tmp_path: Path) -> None:
    dense, model, receipts = done(STEPS["narrow, refitted"])
    before = mark_of(dense), mark_of(model)
    Patch().export(model, SimpleNamespace(receipts=receipts, dense=dense), tmp_path / "patch")
    assert (mark_of(dense), mark_of(model)) == before


def test_another_base_is_refused(tmp_path: Path) -> None:
    dense, _ = written(tmp_path / "patch", (DROP,))
    with torch.no_grad():
        next(dense.parameters()).view(-1)[0] += 1
    with pytest.raises(InputError, match="not the base that this patch was made for: tiny") as error:
        applied(dense, read(tmp_path / "patch"), tmp_path / "patch", "other")
    assert str(error.value).startswith("other: ")


@pytest.mark.parametrize("harm", ["cut off", "changed", "gone", "no patch"])
def test_a_harmed_file_of_tensors_is_refused(harm: str, tmp_path: Path) -> None:
    folder = tmp_path / "patch"
    written(folder, STEPS["refit"])
    path, words = folder / TENSORS, "cut off or changed"
    if harm == "cut off":
        path.write_bytes(path.read_bytes()[:-5])
    elif harm == "changed":
        held = load_file(path)
        next(iter(held.values())).view(-1)[0] += 1e-3
        save_file(held, path)
    elif harm == "gone":
        path.unlink()
        words = "has lost"
    else:
        (folder / FILE).unlink()
        words = "no patch"
    with pytest.raises(InputError, match=words):
        read(folder)


def test_receipts_that_were_edited_are_refused(tmp_path: Path) -> None:
    """Another drop than was exported, with a file of tensors that is whole: the result is not what the patch says."""
    folder = tmp_path / "patch"
    dense, _ = written(folder, (Step(rewrite="drop", sites=("block.1",)),))
    other, _ = written(tmp_path / "other", (Step(rewrite="drop", sites=("block.2",)),))
    assert mark_of(dense) == mark_of(other)
    mine, theirs = (json.loads((f / FILE).read_text(encoding="utf-8")) for f in (folder, tmp_path / "other"))
    (folder / FILE).write_text(json.dumps({**mine, "done": theirs["done"]}), encoding="utf-8")
    with pytest.raises(InputError, match="what comes out is not what the patch says"):
        applied(dense, read(folder), folder, "base")
    mine["done"]["receipts"][0]["structure"]["steps"][0]["depth"] = 9
    (folder / FILE).write_text(json.dumps(mine), encoding="utf-8")
    with pytest.raises(InputError, match="the receipts don't fit the base"):
        applied(copy.deepcopy(other), read(folder), folder, "base")


def test_a_run_that_gives_no_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="made from the base"):
        Patch().export(tiny("llama"), SimpleNamespace(receipts=()), tmp_path / "patch")
    assert patch.changed(tiny("llama"), tiny("llama"), ()) == {}
