"""Sections that only some runs have: tasks, speed engine by engine, the engines that load the result; and fragments."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from lamina.core.documents import Evidence, EvidenceFile, Plan
from lamina.core.errors import InputError
from lamina.core.speeds import SpeedFile, SpeedRow, Spread
from lamina.report import proofs, write
from lamina.report.fragments import evidence_html, plan_html, survey_html
from lamina.report.read import read_run


def words(folder: Path) -> str:
    html = write(folder).read_text(encoding="utf-8")
    text = re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", html, flags=re.DOTALL)
    return " ".join(text.replace("\N{NO-BREAK SPACE}", " ").replace("&lt;", "<").split())


def task(name: str, of: str, value: float, unit: str = "accuracy", **more: float) -> Evidence:
    return Evidence.from_data({"name": name, "of": of, "value": value, "unit": unit, "n": 500, **more})


TASKS = (
    task("task:lambada", "dense", 0.42, low=0.38, high=0.46),
    task("task:lambada", "thinned", 0.31, low=0.27, high=0.35),
    task("task:lambada", "difference", -0.11, low=-0.14, high=-0.08, p=0.0002, sees=0.03),
    task("task.copying", "dense", 1.5, "nats"),
    task("task.copying", "difference", 0.25, "nats", p=0.4),
    task("capability:recall", "difference", -0.05),
)


def test_tasks_have_a_section_of_their_own(run_folder: Path) -> None:
    assert "Seen from" not in words(run_folder)
    file = EvidenceFile.load(run_folder / "evidence.json")
    EvidenceFile(evidence=(*file.evidence, *TASKS)).save(run_folder / "evidence.json")
    text = words(run_folder)
    assert "lambada accuracy 42.0 % 31.0 % −11.0 −14.0 to −8.0 <0.001 3.0 % 500" in text
    assert "copying nats 1.50 — +0.250 — 0.400 — 500" in text
    assert "recall (all its tasks) accuracy — — −5.0" in text
    rows = proofs.tasks(EvidenceFile(evidence=TASKS))
    assert [r.name for r in rows] == ["lambada", "copying", "recall (all its tasks)"]
    assert text.count("task:lambada") == 0, "not among the other evidence"
    chart = proofs.task_chart(EvidenceFile(evidence=TASKS))
    assert chart is not None
    assert str(chart).count("<circle") == 2


def test_speed_engine_by_engine(run_folder: Path) -> None:
    def row(engine: str, ratio: Spread) -> SpeedRow:
        return SpeedRow(
            engine=engine, what="decode", batch=1, length=128, tokens=32, dense=Spread(value=30.0),
            thinned=Spread(value=40.0), ratio=ratio,
        )  # fmt: skip

    rows = (
        row("transformers", Spread(value=1.33, low=1.2, high=1.5)),
        row("llamacpp", Spread(value=1.01, low=0.9, high=1.1)),
    )
    SpeedFile(of="sha256:0", machine={"cpu": "a slow one"}, rows=rows, notes=("busy",)).save(run_folder / "speed.json")
    text = words(run_folder)
    assert "decode, transformers, 1×128 tokens/s 30.0 40.0 ×1.33 1.20–1.50 yes" in text
    assert "decode, llamacpp, 1×128 tokens/s 30.0 40.0 ×1.01 0.90–1.10 none: the interval includes 1" in text
    assert proofs.STALE in text
    assert "Machine: cpu a slow one." in text


@pytest.mark.parametrize("name", proofs.LADDERS)
def test_the_engines_that_load_it(run_folder: Path, name: str) -> None:
    rungs = [
        {"target": "llama.cpp", "ok": True, "why": "GGUF", "ran": True},
        {"target": "vllm", "ok": False, "why": "block 3: <odd>", "nearest": "whole blocks", "ran": False},
    ]
    (run_folder / name).write_text(json.dumps({"receipts": "sha256:0", "rungs": rungs}), encoding="utf-8")
    assert [(r.target, r.ok, r.ran) for r in proofs.ladder(run_folder)] == [
        ("llama.cpp", True, True),
        ("vllm", False, False),
    ]
    text = words(run_folder)
    assert "llama.cpp yes yes GGUF" in text
    assert "vllm no no block 3: <odd>" in text.replace("&gt;", ">")
    (run_folder / name).write_text('{"rungs": 3}', encoding="utf-8")
    with pytest.raises(InputError, match="no list of engines"):
        read_run(run_folder) and proofs.ladder(run_folder)


def test_fragments_are_whole_pieces(run_folder: Path) -> None:
    plan, file = Plan.load(run_folder / "plan.yaml"), EvidenceFile.load(run_folder / "evidence.json")
    for made, same in ((plan_html(run_folder), plan_html(plan)), (evidence_html(run_folder), evidence_html(file))):
        assert made == same
        ET.fromstring(made.replace("\N{NO-BREAK SPACE}", " "))
        assert "<script" not in made
    assert "keep 75" in plan_html(plan)
    assert plan.steps[0].sites[0] in plan_html(plan)
    assert "×1.53" in evidence_html(file)
    assert "passed" in evidence_html(file)
    with pytest.raises(InputError, match=r"survey\.parquet"):
        survey_html(run_folder / "model")
    with pytest.raises(InputError, match=r"plan\.yaml is missing"):
        plan_html(run_folder / "model")
    with pytest.raises(InputError, match=r"evidence\.json is missing"):
        evidence_html(run_folder / "model")
