"""The ladder against what exporters really do, nearest plans that are then loaded, cards, and patches by command."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import export_run
import pytest
import tiny_run
from export_run import cut, drops

from lamina.core import registry
from lamina.core.documents import Plan, Step
from lamina.core.errors import LaminaError
from lamina.exporters.ladder import FILE, TARGETS, Ladder
from lamina.pipeline import Run, exporting
from lamina.pipeline.nearest import nearest
from lamina.pipeline.rungs import NONE, climb

NEURONS, GROUPS = "block.1.mlp.neuron", "block.2.attention.kv_group"
WRITERS = {"vllm": ("deci", {}), "tensorrt-llm": ("deci", {"engine": "tensorrt-llm"}), "llama.cpp": ("gguf", {})}
PLANS: dict[str, tuple[tuple[Step, ...], dict[str, Any], set[str]]] = {
    "blocks": ((drops("block.1"),), {}, set()),
    "attentions": ((drops("block.1.attention"), drops("block.2.attention")), {}, {"transformers"}),
    "the first attention": ((drops("block.0.attention"),), {}, {"transformers", "vllm", "tensorrt-llm"}),
    "two first attentions and a block": (
        (drops("block.0", "block.1.attention"),), {}, {"transformers", "vllm", "tensorrt-llm"},
    ),
    "neurons of one block": ((cut(NEURONS, range(20)),), {}, {"transformers", "vllm", "tensorrt-llm"}),
    "neurons to a width that can be said": ((cut(NEURONS, range(256)),), {}, {"transformers"}),
    "KV groups of one block": ((cut(GROUPS, [0]),), {}, {"transformers", "vllm", "tensorrt-llm"}),
    "a map in the place of an MLP": (
        (Step(rewrite="replace", sites=("block.2.mlp",), options={"by": "linear"}), drops("block.1")), {},
        {"transformers", "vllm", "tensorrt-llm", "llama.cpp", "ollama"},
    ),
    "biases": ((drops("block.1"),), {"name": "qwen2"}, {"tensorrt-llm"}),
    "QK-norm": ((drops("block.1.mlp"),), {"name": "qwen3"}, set(TARGETS) - {"shim", "onnxruntime"}),
    "a scaled stream": ((drops("block.1"),), {"name": "granite"}, {"vllm", "tensorrt-llm", "llama.cpp", "ollama"}),
}  # fmt: skip
"""Plan → the targets that do not load what it makes."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Runs that have done nothing yet, of a kind each, whose dense model is loaded once."""
    known: dict[str, Run] = {}

    def give(name: str, folder: Path) -> Run:
        if name not in known:
            known[name] = export_run.begin(tmp_path_factory.mktemp(name), name)
        first = known[name]
        run = Run.start(folder / "run", first.recipe)
        run.loaded, run.tokens, run.anatomy = first.loaded, first.tokens, first.anatomy
        return run

    with pytest.MonkeyPatch.context() as patch:
        tiny_run.make_quick(patch)
        yield give


@pytest.mark.parametrize("case", PLANS)
def test_the_ladder_is_true(case: str, bases: Any, tmp_path: Path) -> None:
    """A target is said to load exactly what its exporter then writes; the stock class, what has no shim file."""
    steps, options, no = PLANS[case]
    run = export_run.planned(bases(options.get("name", "llama"), tmp_path), *steps)
    rungs = {r.target: r for r in climb(run)}
    assert list(rungs) == list(TARGETS)
    assert {t for t, r in rungs.items() if not r.ok} == no
    assert all(r.why and "\n" not in r.why for r in rungs.values())
    assert rungs["transformers"].ok is not (run.path("model") / "modeling_lamina.py").is_file()
    receipts = run.receipts()
    for target, (kind, choice) in WRITERS.items():
        exporter = registry.EXPORTERS.make(kind, choice)
        made = SimpleNamespace(receipts=receipts, tokenizer=run.loaded.tokenizer)
        to = tmp_path / f"{target}.gguf"
        refused = contextlib.nullcontext() if rungs[target].ok else pytest.raises(LaminaError)
        with refused:
            exporter.export(run.thinned, made, to)
        assert to.exists() is rungs[target].ok, target
    assert Ladder.load(run.path(FILE)).rungs == tuple(rungs.values())


NEAR: dict[str, dict[str, str]] = {
    "attentions": {"transformers": "keep block.1.attention, keep block.2.attention (+6,208 parameters)"},
    "the first attention": {"vllm": "keep block.0.attention (+3,104 parameters)"},
    "two first attentions and a block": {"vllm": "keep block.1.attention (+3,104 parameters)"},
    "neurons of one block": {
        "vllm": "narrow block.1.mlp.neuron to 512 (+1,920 parameters)",
        "transformers": "leave out narrow of block.1.mlp.neuron (+1,920 parameters)",
    },
    "KV groups of one block": {"vllm": "leave out narrow of block.2.attention.kv_group (+1,536 parameters)"},
    "a map in the place of an MLP": {"llama.cpp": "leave out replace of block.2.mlp (+48,096 parameters)"},
    "QK-norm": {"llama.cpp": NONE, "transformers": "drop block.1 whole (-3,120 parameters)"},
}
QUICK = ("the first attention", "neurons of one block", "QK-norm")


@pytest.mark.parametrize("case", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NEAR])
def test_the_nearest_plan_is_priced_and_then_loaded(case: str, bases: Any, tmp_path: Path) -> None:
    steps, options, _ = PLANS[case]
    name = options.get("name", "llama")
    run = export_run.planned(bases(name, tmp_path / "one"), *steps)
    rungs = {r.target: r for r in climb(run)}
    receipts, before = run.receipts(), sum(p.numel() for p in run.thinned.parameters())
    for target, line in NEAR[case].items():
        assert rungs[target].nearest == line
        if line == NONE:
            continue
        found = nearest(run.plan(), [target], run.anatomy, receipts.receipts)
        assert found is not None
        again = export_run.planned(bases(name, tmp_path / target), *found.plan.steps)
        assert {r.target: r.ok for r in climb(again)}[target]
        assert sum(p.numel() for p in again.thinned.parameters()) == before + found.parameters


def test_what_is_left_of_a_block_goes_where_that_is_less(bases: Any, tmp_path: Path) -> None:
    """Without its MLP, block 2 is nearer to nothing than to the whole: 3,104 parameters go instead of 49,184 back."""
    run = export_run.planned(bases("llama", tmp_path), drops("block.2.mlp"))
    found = {r.target: r.nearest for r in climb(run)}
    assert found["transformers"] == "drop block.2 whole (-3,104 parameters)"


def test_a_refit_goes_around_what_is_dropped_after_all(bases: Any, tmp_path: Path) -> None:
    from lamina.rewrites.refit import refit_sites

    run = bases("llama", tmp_path)
    gone = ["block.1.attention", "block.2.mlp"]
    refit = Step(rewrite="refit", sites=refit_sites(run.anatomy, gone), options={"around": gone, "ridge": 0.1})
    run = export_run.planned(run, refit, drops(*gone))
    found = nearest(run.plan(), ["transformers"], run.anatomy, run.receipts().receipts)
    assert found is not None
    assert found.plan.steps[1].sites == ("block.2",)
    assert found.plan.steps[0].options == {"around": ["block.2"], "ridge": 0.1}
    assert found.plan.steps[0].sites == refit_sites(run.anatomy, ["block.2"])


def test_the_nearest_plan_as_a_file(bases: Any, tmp_path: Path, lamina: Any) -> None:
    run = export_run.planned(bases("llama", tmp_path), drops("block.0.attention", "block.2.mlp"))
    to = tmp_path / "near.yaml"
    code, out, err = lamina("export", run.folder, "--nearest", to, "--format", "deci")
    assert (code, err) == (0, "")
    assert "keep block.0.attention (+3,104 parameters)" in out
    assert Plan.load(to).sites() == ("block.2.mlp",)
    assert lamina("export", run.folder, "--nearest", to)[0] == 0
    assert Plan.load(to).sites() == ("block.2",)
    tiny_run.refused(lamina("export", run.folder, "--nearest", tmp_path / "near.txt"), ".yaml")
    (tmp_path / "two").mkdir()
    whole = export_run.planned(bases("llama", tmp_path / "two"), drops("block.2"))
    tiny_run.refused(lamina("export", whole.folder, "--nearest", tmp_path / "none.yaml"), "loaded as it is")
    assert not (tmp_path / "none.yaml").exists()


def test_cards_say_plan_evidence_papers_and_licence(bases: Any, tmp_path: Path) -> None:
    from lamina.core.documents import Evidence, EvidenceFile

    run = export_run.planned(bases("llama", tmp_path), drops("block.2.mlp"), drops("block.1"))
    found = Evidence(name="loss", value=3.5, low=3.25, high=3.75, unit="nats/token", n=8)
    EvidenceFile(evidence=(found,)).save(run.path("evidence.json"))
    assert run.loaded.path is not None
    (run.loaded.path / "README.md").write_text("---\nlicense: mit\nother: x\n---\n", encoding="utf-8")
    for kind in ("hf", "deci", "gguf", "patch"):
        exporting.export(run, tmp_path / kind, kind)
        card = (tmp_path / kind / "README.md").read_text(encoding="utf-8")
        assert "| drop | `block.2.mlp` |" in card
        assert "3.5 [3.25, 3.75] nats/token" in card
        assert "@article{men2024shortgpt," in card
        assert "license: mit" in card
        assert {"deci": "vllm serve", "gguf": "ollama create", "patch": "lamina apply BASE"}.get(kind, "trust") in card
    assert (tmp_path / "gguf" / "Modelfile").read_text(encoding="utf-8").startswith("FROM ./model.gguf\n")
    assert tiny_run.contents(tmp_path / "hf", "README.md") == tiny_run.contents(run.path("model"), "README.md")
    assert {p.stat().st_mode for p in (tmp_path / "patch").iterdir()} == {run.path("plan.yaml").stat().st_mode}
    (run.loaded.path / "README.md").unlink()


def test_what_ran_is_noted_until_another_checkpoint_is_published(bases: Any, tmp_path: Path) -> None:
    from lamina.exporters import _gguf_run

    if not _gguf_run.available():
        pytest.skip("llama.cpp's wheel is not installed (pip install xllamacpp)")
    run = export_run.planned(bases("llama", tmp_path), drops("block.2"))
    files = exporting.export(run, tmp_path / "x.gguf", "gguf")
    assert [f.name for f in files] == ["x.Modelfile", "x.gguf"]
    assert [r.target for r in Ladder.load(run.path(FILE)).rungs] == ["llama.cpp"]
    assert {r.target for r in climb(run) if r.ran} == {"transformers", "llama.cpp"}
    export_run.planned(run, drops("block.1"))
    assert not run.path(FILE).exists()
    assert {r.target for r in climb(run) if r.ran} == {"transformers"}


def test_a_file_that_runs_otherwise_is_not_published(
    bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = export_run.planned(bases("llama", tmp_path), drops("block.2"))
    monkeypatch.setattr("lamina.exporters._gguf_run.available", lambda: True)
    monkeypatch.setattr("lamina.exporters._gguf_run.run_check", lambda *_, **__: "llama.cpp continues otherwise")
    with pytest.raises(LaminaError, match="continues otherwise"):
        exporting.export(run, tmp_path / "x.gguf", "gguf")
    own: Any = copy.deepcopy(run.thinned)
    own.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
    monkeypatch.setattr("lamina.lab.load.load_weights", lambda *_, **__: own)
    with pytest.raises(LaminaError, match="the logits differ by"):
        exporting.export(run, tmp_path / "deci", "deci")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    assert not run.path(FILE).exists()


def test_a_patch_by_command(bases: Any, tmp_path: Path, lamina: Any) -> None:
    run = export_run.planned(bases("llama", tmp_path), cut(NEURONS, range(256), refit=0.1), drops("block.2"))
    base, folder, to = run.loaded.path, tmp_path / "patch", tmp_path / "made"
    code, out, err = lamina("export", run.folder, "--to", folder, "--format", "patch")
    assert (code, err) == (0, "")
    assert json.loads((folder / "patch.json").read_text(encoding="utf-8"))["changed"] == 1
    code, out, err = lamina("apply", base, folder, "--to", to)
    assert (code, err) == (0, "")
    assert str(to / "model.safetensors") in out.replace("\n", "")
    assert tiny_run.contents(to) == tiny_run.contents(run.path("model"))
    tiny_run.refused(lamina("apply", base, folder, "--to", to), "already")
    tiny_run.refused(lamina("apply", base, folder), "where to?")
    tiny_run.refused(lamina("apply", run.folder, "--to", to), "belong to a patch")
    tiny_run.refused(lamina("apply", base, base, "--to", tmp_path / "other"), "no patch")
    other = bases("qwen2", tmp_path / "qwen2").loaded.path
    tiny_run.refused(lamina("apply", other, folder, "--to", tmp_path / "other"), "not the base")
    (folder / "changed.safetensors").write_bytes(b"x")
    tiny_run.refused(lamina("apply", base, folder, "--to", tmp_path / "other"), "cut off or changed")
    assert not (tmp_path / "other").exists()


def test_a_patch_that_does_not_reload_is_not_published(
    bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lamina.core.errors import ReloadError
    from lamina.pipeline.patching import apply_patch

    def broken(*_: Any, **__: Any) -> None:
        raise ReloadError("the logits differ")

    run = export_run.planned(bases("llama", tmp_path), drops("block.2"))
    exporting.export(run, tmp_path / "patch", "patch")
    monkeypatch.setattr("lamina.evaluators.reload.contract", broken)
    with pytest.raises(ReloadError):
        apply_patch(str(run.loaded.path), tmp_path / "patch", tmp_path / "made")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["patch", "run"]
