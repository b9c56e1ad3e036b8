"""The Python API: the words of the command line, on models on disk and in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lamina
from lamina.api import Result, report
from lamina.core.documents import EvidenceFile, ModelRef, Plan, Receipts
from lamina.core.errors import InputError, LaminaError
from lamina.testing.bench import expect_same, picture
from lamina.testing.models import text, tiny
from lamina.testing.tools import tokenizer

pytestmark = pytest.mark.usefixtures("quick")


def data(bench: Path, **more: Any) -> dict[str, Any]:
    return {
        "calibration": str(bench / "calibration.txt"), "heldout": str(bench / "heldout.txt"), "length": 32,
        "sequences": 8, "heldout_sequences": 8, **more,
    }  # fmt: skip


def refused(*words: str, **asked: Any) -> str:
    with pytest.raises(LaminaError) as caught:
        lamina.thin(**asked)
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line
    return line


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("heal", [None, 2])
def test_a_module_in_memory_is_left_as_it_is(bench: Path, tmp_path: Path, training: bool, heal: int | None) -> None:
    model: Any = tiny("llama", vocab_size=300).train(training)
    model.model.layers[1].mlp.train(not training)
    before = picture(model)
    found = lamina.thin(model=model, tokenizer=tokenizer(), keep=0.7, out=tmp_path / "run", data=data(bench), heal=heal)
    expect_same(before, picture(model), "thin")
    assert found.model is not model
    assert not found.model.training
    size = sum(p.numel() for p in found.model.parameters())
    assert size <= 0.7 * sum(p.numel() for p in model.parameters())
    assert found.folder == tmp_path / "run"
    assert found.plan.budget.keep == 0.7
    assert found.receipts.receipts[-1].after.parameters == size
    assert bool(found.receipts.healed) is (heal is not None)
    ratio = found.evidence.get("parameters", "ratio")
    assert ratio is not None
    assert ratio.value == pytest.approx(size / found.receipts.receipts[0].before.parameters)
    assert (found.folder / "report.html").is_file()


def test_the_result_computes_what_model_holds(bench: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny("llama", vocab_size=300)
    found: Any = lamina.thin(model, tokenizer=tokenizer(), sublayers=3, out=tmp_path / "run", data=data(bench))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(found.model(text()).logits, loaded(text()).logits)


def test_memory_and_disk_choose_the_same(bench: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"sublayers": 2, "recipe": "damage", "data": data(bench), "dtype": "float32"}
    model = tiny("llama", vocab_size=300)
    one = lamina.thin(model, tokenizer=tokenizer(), out=tmp_path / "one", **asked)
    other = lamina.thin(str(bench / "model"), out=tmp_path / "other", **asked)
    assert one.plan.steps == other.plan.steps
    assert one.receipts.receipts == other.receipts.receipts
    assert one.plan.model.fingerprint != other.plan.model.fingerprint


def test_the_verbs_one_by_one(bench: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    asked: dict[str, Any] = {"keep": 0.7, "heal": 2, "data": data(bench), "tokenizer": tokenizer()}
    model = tiny("llama", vocab_size=300).train()
    before = picture(model)
    scores = lamina.survey(model, out=run, **asked)
    expect_same(before, picture(model), "survey")
    assert set(scores["cosine"].values) >= {"block.0", "block.0.attention", "block.3.mlp"}
    plan = lamina.plan(run, model=model, tokenizer=asked["tokenizer"])
    receipts = lamina.apply(run, model=model, tokenizer=asked["tokenizer"])
    assert not receipts.healed
    healed = lamina.heal(run, model=model, tokenizer=asked["tokenizer"])
    assert healed.receipts == receipts.receipts
    evidence = lamina.prove(run, model=model, tokenizer=asked["tokenizer"])
    assert evidence.get("perplexity") is not None
    assert report(run) == run / "report.html"
    expect_same(before, picture(model), "a verb")
    found = lamina.thin(model, out=whole, **asked)
    assert (found.plan, found.receipts) == (plan, healed)


def test_a_module_without_a_tokenizer_takes_token_ids(tmp_path: Path) -> None:
    for name, seed in (("calibration", 1), ("heldout", 2)):
        save_file({"input_ids": text(12, 32, seed=seed)}, tmp_path / f"{name}.safetensors")
    ids = {"calibration": str(tmp_path / "calibration.safetensors"), "heldout": str(tmp_path / "heldout.safetensors")}
    asked = {**ids, "length": 32, "sequences": 8, "heldout_sequences": 8}
    found = lamina.thin(tiny("llama"), blocks=1, out=tmp_path / "run", data=asked)
    assert len(found.plan.sites()) >= 1
    assert not (tmp_path / "run" / "model" / "tokenizer.json").exists()


def test_a_module_without_a_tokenizer_takes_no_text(bench: Path, tmp_path: Path) -> None:
    refused("no tokenizer", "token ids", model=tiny("llama"), blocks=1, out=tmp_path / "run", data=data(bench))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["nanogpt", "linear"])
def test_a_module_that_is_no_causal_model_of_transformers(bench: Path, tmp_path: Path, name: str) -> None:
    model = tiny("nanogpt", vocabulary=300) if name == "nanogpt" else torch.nn.Linear(3, 3)
    refused(
        type(model).__name__, "config", model=model, tokenizer=tokenizer(), keep=0.7, out=tmp_path / "run",
        data=data(bench),
    )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_a_module_whose_certificate_fails(bench: Path, tmp_path: Path) -> None:
    model: Any = tiny("llama", vocab_size=300).train()
    layer = model.model.layers[2]
    plain = layer.forward

    def louder(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        return out + 0.01 * torch.tanh(out)

    layer.forward = louder
    before = picture(model)
    refused("block", model=model, tokenizer=tokenizer(), keep=0.7, out=tmp_path / "run", data=data(bench))
    expect_same(before, picture(model), "a refusal")
    assert not {"plan.yaml", "model", "receipts.json"} & {p.name for p in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"keep": 1.5}, ("keep", "(0, 1]")),
        ({"keep": 0.5, "blocks": 1}, ("one budget at a time",)),
        ({"keep": 0.5, "recipe": "shortgtp"}, ("did you mean shortgpt",)),
        ({"keep": 0.5, "dtyp": "float32"}, ("unknown key 'dtyp'", "did you mean dtype")),
        ({"keep": 0.5, "heal": 0}, ("positive",)),
        ({"keep": 0.5, "planner_options": {"shortlst": 3}}, ("did you mean shortlist?",)),
        ({"keep": 0.5, "data": {"lenght": 3}}, ("did you mean length?",)),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_work(
    bench: Path, tmp_path: Path, asked: dict[str, Any], words: tuple[str, ...]
) -> None:
    refused(*words, model=str(bench / "model"), out=tmp_path / "run", **{"data": data(bench), **asked})
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_taken_as_it_is(bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"blocks": 1, "data": data(bench), "out": tmp_path / "run", "tokenizer": tokenizer()}
    model = tiny("llama", vocab_size=300)
    one = lamina.thin(model, **asked)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("work was done again")

    monkeypatch.setattr("lamina.lab.lab.Lab.forward", fail)
    again = lamina.thin(model, **asked)
    assert (again.plan, again.receipts, again.evidence) == (one.plan, one.receipts, one.evidence)
    with torch.no_grad():
        assert torch.equal(one.model(text()).logits, again.model(text()).logits)


def test_what_verbs_give_shows_itself_in_a_notebook(bench: Path, tmp_path: Path) -> None:
    """Tables without a word of HTML from names; and the same documents as the files hold."""
    model = tiny("llama", vocab_size=300)
    asked: dict[str, Any] = {"tokenizer": tokenizer(), "blocks": 1, "data": data(bench), "recipe": "shortgpt"}
    run = tmp_path / "<b>run"
    survey = lamina.survey(model, out=run, **asked)
    plan: Any = lamina.plan(run, model=model, tokenizer=tokenizer())
    lamina.apply(run, model=model, tokenizer=tokenizer())
    proof: Any = lamina.prove(run, model=model, tokenizer=tokenizer())
    assert plan.sites()[0] in plan._repr_html_()
    assert "Perplexity" in proof._repr_html_()
    assert "block-influence" in survey._repr_html_()
    assert plan == Plan.load(run / "plan.yaml")
    assert Plan.load(run / "plan.yaml") == plan
    assert proof == EvidenceFile.load(run / "evidence.json")
    named = replace(plan, model=ModelRef(name="<script>alert(1)</script>", fingerprint="&"), recipe="<i>")
    assert named != plan
    receipts = Receipts(model=named.model, plan="", receipts=())
    for shown in (named, Result(run, model, named, receipts, proof)):
        html = shown._repr_html_()
        assert "&lt;script&gt;" in html
        assert "<script" not in html
        assert "<i>" not in html


def test_another_module_in_the_same_folder_is_noticed(bench: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"blocks": 1, "data": data(bench), "out": tmp_path / "run", "tokenizer": tokenizer()}
    one = lamina.thin(tiny("llama", vocab_size=300), **asked)
    other = lamina.thin(tiny("llama", vocab_size=300, seed=1), **asked)
    assert one.plan.model.fingerprint != other.plan.model.fingerprint
    assert one.receipts.plan != other.receipts.plan


def test_the_package_gives_the_verbs_and_nothing_else() -> None:
    assert {"thin", "survey", "plan", "apply", "heal", "prove"} <= set(lamina.__all__)
    for name in lamina.__all__:
        assert getattr(lamina, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'thim'"):
        lamina.thim  # noqa: B018
    with pytest.raises(InputError, match="no run folder"):
        lamina.plan("nowhere")
