"""The command line: help, lists without torch, one whole run through the console entry, exports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch

from lamina.cli import app
from lamina.core import registry
from lamina.core.documents import EvidenceFile, Receipts
from lamina.exporters.ladder import TARGETS, Ladder

ENTRY = [sys.executable, "-m", "lamina"]
COMMANDS = sorted(c.name or c.callback.__name__ for c in app.registered_commands if c.callback)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_run.make_bench(tmp_path_factory.mktemp("bench"))
    tiny_run.make_model(folder / "gpt2", "gpt2")
    return folder


def in_process(*arguments: str) -> None:
    from lamina.cli import main

    with pytest.MonkeyPatch.context() as patch:
        tiny_run.make_quick(patch)
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
    assert end.value.code == 0


@pytest.fixture(scope="module")
def blocks(bench: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that dropped a whole block."""
    run = tmp_path_factory.mktemp("blocks") / "run"
    in_process(*tiny_run.thin_command(bench, run, "--blocks", "1"))
    return run


@pytest.fixture(scope="module")
def sublayers(bench: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that dropped two attentions."""
    run = tmp_path_factory.mktemp("sublayers") / "run"
    in_process(*tiny_run.thin_command(bench, run, "--sublayers", "2", "--recipe", "llm-drop-attention"))
    return run


# ---------------------------------------------------------------- help and lists


def test_the_commands_are_the_verbs_and_the_lists() -> None:
    verbs = {"survey", "plan", "apply", "heal", "prove", "export", "report"}
    assert verbs | {"thin", "anatomy", "methods", "show", "cite"} <= set(COMMANDS)


@pytest.mark.parametrize("word", ["-h", "--help"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_text_has_an_example_that_the_parser_takes(lamina: Any, command: str, word: str) -> None:
    code, out, err = lamina(command, word)
    assert (code, err) == (0, "")
    lines = " ".join(out.split())
    assert f"Example: lamina {command} " in lines
    example = next(c.epilog for c in app.registered_commands if (c.name or c.callback.__name__) == command)
    words = example.removeprefix("Example: lamina ").split()
    options = {w for w in words if w.startswith("--")}
    assert all(option in out for option in options)


def test_without_a_command_the_help_is_shown(lamina: Any) -> None:
    code, out, err = lamina("--help")
    assert (code, err) == (0, "")
    assert all(command in out for command in COMMANDS)
    assert "lamina thin smollm2-135m --keep 75%" in out
    _, out, err = lamina()
    assert "lamina thin smollm2-135m --keep 75%" in out + err


def test_lists_and_reports_do_not_import_torch(blocks: Path, tmp_path: Path) -> None:
    script = f"""
import sys
from lamina.cli import main
for words in (["--help"], ["thin", "-h"], ["methods"], ["methods", "--role", "planner"], ["show", "finercut"],
              ["cite", "shortgpt"], ["report", {str(blocks)!r}], ["show", "nothing"], ["thin", "x", "--keep", "150%"]):
    try:
        main(words)
    except SystemExit as end:
        print("exit", end.code, *words)
    found = sorted({{m.split(".")[0] for m in sys.modules}} & {{"torch", "transformers", "peft"}})
    assert not found, (words, found)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("exit")] == ["0"] * 7 + ["2"] * 2


def test_every_method_and_recipe_can_be_shown_and_listed(lamina: Any) -> None:
    names = {*registry.rows(), *(n for role in registry.ROLES.values() for n in role)}
    listed = lamina("methods")[1]
    for name in sorted(names):
        code, out, err = lamina("show", name)
        assert (code, err) == (0, "")
        assert name in out
        assert name in listed
    for role in ("recipe", *registry.ROLES):
        code, out, _ = lamina("methods", "--role", role)
        assert code == 0
        assert role in out


def test_every_paper_can_be_cited(lamina: Any) -> None:
    cards = [role.card(name) for role in registry.ROLES.values() for name in role]
    for entry in (*cards, *registry.rows().values()):
        if entry.paper is None:
            continue
        code, out, err = lamina("cite", entry.name)
        assert (code, err) == (0, "")
        assert out.startswith("@article{")
        assert f"{entry.paper.year}" in out


def test_the_anatomy_is_printed_with_its_proof(lamina: Any, bench: Path) -> None:
    code, out, err = lamina("anatomy", bench / "model", "--certify")
    assert (code, err) == (0, "")
    assert all(f"block.{n}" in out and f"block.{n}.attention" in out and f"block.{n}.mlp" in out for n in range(4))
    assert "certified: input + branches = output in every block" in out


# ---------------------------------------------------------------- a whole run


def test_one_whole_run_through_the_console_entry(bench: Path, tmp_path: Path) -> None:
    """Nothing is stood in for: the contract in a fresh process, times, memory."""
    run = tmp_path / "run"
    command = [*ENTRY, *tiny_run.thin_command(bench, run, "--sublayers", "3", "--recipe", "finercut", "--gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("perplexity", "parameters", "prefill, tokens/s", "decode, tokens/s", "peak memory", "expected loss"):
        assert words in done.stdout
    assert f"report {run / 'report.html'}" in done.stdout.replace("\n", " ")
    assert "surveying 12 sites" in done.stdout
    names = {"recipe.yaml", "plan.yaml", "survey.parquet", "receipts.json", "evidence.json", "model", "model.gguf"}
    names |= {"survey-grids.parquet", "ladder.json", "model.Modelfile"}
    assert {p.name for p in run.iterdir()} == names | {"report.html", "log.txt", ".state"}
    assert tiny_run.left_behind(run) == []
    found = EvidenceFile.load(run / "evidence.json")
    contract = {e.name: e for e in found.evidence if e.of == "contract"}
    assert set(contract) == {"reload_logits", "reload_cache", "reload_padding", "reload_generate"}
    for name in ("prefill", "decode", "peak_memory", "perplexity", "kv_bytes", "parameters"):
        ratio = found.get(name, "ratio")
        assert ratio is not None
        assert ratio.value > 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "finercut" in page.lower()


def test_a_model_with_a_short_context(
    lamina: Any, bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Speed and memory are measured on what it can read."""
    monkeypatch.setattr("lamina.evaluators.reload.contract", tiny_run.no_contract)
    if not (bench / "short").exists():
        tiny_run.make_model(bench / "short", "gpt2", n_positions=48)
    run = tmp_path / "run"
    code, _, err = lamina(*tiny_run.thin_command(bench, run, "--blocks", "1", model="short"))
    assert (code, err) == (0, "")
    found = EvidenceFile.load(run / "evidence.json")
    for name, how in (("prefill", "1×48 tokens"), ("decode", "1×8 tokens after 32"), ("peak_memory", "1×48 tokens")):
        evidence = found.get(name, "ratio" if name != "peak_memory" else "thinned")
        assert evidence is not None
        assert how in evidence.how


def test_healing_a_published_model_of_a_shim_keeps_the_contract(bench: Path, sublayers: Path, tmp_path: Path) -> None:
    """`lamina heal` in a process of its own, on a model with sublayers gone, through the real contract."""
    import shutil

    run = shutil.copytree(sublayers, tmp_path / "run")
    done = subprocess.run([*ENTRY, "heal", str(run), "--steps", "2"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert Receipts.load(run / "receipts.json").healed["steps"] == 2
    config = json.loads((run / "model" / "config.json").read_text(encoding="utf-8"))
    assert len(config["lamina"]["structure"]) == 1, "the structure is told once"


WHILE_LOADING = """
class Strike:
    def find_spec(self, name, *_):
        if name == "lamina.cli":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Strike())
"""
WHILE_A_TEXT_RUNS = WHILE_LOADING.replace("os.kill(os.getpid(), signal.SIGINT)", 'exec("raise KeyboardInterrupt")')
AFTER_THE_WORK = "atexit.register(os.kill, os.getpid(), signal.SIGINT)"


@pytest.mark.parametrize(
    ("strike", "code"),
    [(WHILE_LOADING, 130), (WHILE_A_TEXT_RUNS, 130), (AFTER_THE_WORK, 0)],
    ids=["loading", "text", "ending"],
)
def test_ctrl_c_outside_the_work(strike: str, code: int, tmp_path: Path) -> None:
    """While the command line is still being loaded: one line. With all done: too late to matter."""
    (tmp_path / "sitecustomize.py").write_text(f"import atexit, os, signal, sys\n{strike}\n", encoding="utf-8")
    command = [sys.executable, "-m", "lamina", "methods"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == code, done.stderr
    assert done.stderr == ("interrupted; the same command goes on from here\n" if code else "")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_at_any_time(bench: Path, tmp_path: Path, number: int) -> None:
    """Struck after 2, 4, 6, … seconds, wherever it then is; the same command goes on."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    asked = ("--keep", "70%", "--heal", "5")
    assert subprocess.run([*ENTRY, *tiny_run.thin_command(bench, whole, *asked)], check=False).returncode == 0
    command, seconds = [*ENTRY, *tiny_run.thin_command(bench, run, *asked)], 2.0
    while True:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        _, err = process.communicate(timeout=120)
        if process.returncode == 0:
            break
        assert process.returncode == (130 if number == signal.SIGINT else -number), err
        if number == signal.SIGINT:
            assert err.splitlines()[-1:] == ["interrupted; the same command goes on from here"]
        seconds += 2
        time.sleep(0.1)
    assert seconds > 2
    for name in ("plan.yaml", "receipts.json", "model/model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert tiny_run.left_behind(run) == []


# ---------------------------------------------------------------- export


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    from lamina.lab.load import quiet

    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    with quiet(), torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)(ids).logits


@pytest.mark.parametrize("which", ["blocks", "sublayers"])
def test_export_to_a_folder_is_what_was_checked(
    lamina: Any, request: pytest.FixtureRequest, tmp_path: Path, which: str
) -> None:
    run, to = request.getfixturevalue(which), tmp_path / "exported"
    code, out, err = lamina("export", run, "--to", to)
    assert (code, err) == (0, "")
    assert str(to / "config.json") in out.replace("\n", "")
    assert tiny_run.contents(to, "README.md") == tiny_run.contents(run / "model", "README.md")
    assert "## Evidence" in (to / "README.md").read_text(encoding="utf-8")
    assert torch.equal(logits(to), logits(run / "model"))
    code, out, _ = lamina("export", run)
    assert (code, Path(out.splitlines()[-1])) == (0, run / "model")


@pytest.mark.parametrize(("which", "architecture"), [("blocks", "llama"), ("sublayers", "deci")])
def test_export_to_gguf(
    lamina: Any, request: pytest.FixtureRequest, tmp_path: Path, which: str, architecture: str
) -> None:
    from gguf import GGUFReader

    run, to = request.getfixturevalue(which), tmp_path / "model.gguf"
    before = tiny_run.contents(run, "log.txt", "ladder.json")
    code, out, err = lamina("export", run, "--to", to)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == str(to)
    assert to.with_suffix(".Modelfile").read_text(encoding="utf-8").startswith("FROM ./model.gguf\n")
    reader = GGUFReader(to)
    assert bytes(reader.fields["general.architecture"].parts[-1]).decode() == architecture
    assert tiny_run.contents(run, "log.txt", "ladder.json") == before


@pytest.mark.parametrize("which", ["blocks", "sublayers"])
def test_check_says_what_is_true(lamina: Any, request: pytest.FixtureRequest, tmp_path: Path, which: str) -> None:
    run = request.getfixturevalue(which)
    code, out, _ = lamina("export", run, "--check")
    assert code == 0
    rows = {title: next(line for line in out.splitlines() if line.startswith(title)) for title in TARGETS.values()}
    plain = not (run / "model" / "modeling_lamina.py").exists()
    said = {target: rows[title].removeprefix(title).split()[0] for target, title in TARGETS.items()}
    assert said["transformers"] == ("yes" if plain else "no")
    assert ("nearest plan: keep block." in out) is not plain
    assert (said["shim"], said["llama.cpp"], said["vllm"]) == ("yes", "yes", "no")  # its MLPs are 64 wide
    assert said == {r.target: "yes" if r.ok else "no" for r in Ladder.load(run / "ladder.json").rungs}
    assert lamina("export", run, "--format", "gguf", "--to", tmp_path)[0] == 0
    assert (tmp_path / "model.gguf").is_file()


def test_a_model_that_llama_cpp_does_not_take(lamina: Any, bench: Path, tmp_path: Path) -> None:
    """GPT-2 is no Llama: `--gguf` says so before any work, `--check` and `export` afterwards."""
    run = tmp_path / "run"
    command = tiny_run.thin_command(bench, run, "--blocks", "1", model="gpt2")
    line = tiny_run.refused(lamina(*command, "--gguf"))
    assert not run.exists()
    in_process(*command)
    code, out, _ = lamina("export", run, "--check")
    assert code == 0
    (rung,) = [r for r in Ladder.load(run / "ladder.json").rungs if r.target == "llama.cpp"]
    assert not rung.ok
    assert rung.why.split()[0] in line
    assert "none: it does not load the dense model either" in " ".join(out.split())
    tiny_run.refused(lamina("export", run, "--to", tmp_path / "model.gguf"))
    assert not (tmp_path / "model.gguf").exists()


def test_a_recipe_file_says_all(lamina: Any, bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe that a run folder keeps can be run again, elsewhere, to the same bytes."""
    tiny_run.make_quick(monkeypatch)
    first, again = tmp_path / "first", tmp_path / "again"
    more = ("--sublayers", "2", "--recipe", "llm-drop-joint", "--heal", "2", "--protect", "block.1")
    assert lamina(*tiny_run.thin_command(bench, first, *more))[0] == 0
    code, _, err = lamina("thin", "--recipe", first / "recipe.yaml", "--out", again)
    assert (code, err) == (0, "")
    timed = ("log.txt", "evidence.json", "report.html", ".state")
    assert tiny_run.contents(again, *timed) == tiny_run.contents(first, *timed)


def test_the_default_folder_is_named_after_model_and_recipe(
    lamina: Any, bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_run.make_quick(monkeypatch)
    monkeypatch.chdir(tmp_path)
    command = tiny_run.thin_command(bench, tmp_path, "--blocks", "1", "--recipe", "shortgpt")
    place = command.index("--out")
    assert lamina(*command[:place], *command[place + 2 :])[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["model-shortgpt"]


def test_lists_load_nothing_heavy() -> None:
    """Half a second is the aim: what would miss it is an import, and imports can be counted where times wobble."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lamina", "methods"], check=True, capture_output=True, text=True
    )
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert {"typer", "lamina"} <= loaded
    assert not loaded & {"torch", "transformers", "peft", "scipy", "polars", "jinja2", "gguf"}
