"""What the end-to-end tests run on: a tiny model's folder, two texts, a stand-in for the reload contract."""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lamina.core.documents import Evidence

WORDS = "the a of river stone cold under light small house they went before morning rain old road and then he saw again"
SHORT = ("--length", "32", "--sequences", "8", "--heldout-sequences", "8", "--dtype", "float32")
ZYGOTE = Path(__file__).with_name("zygote.py")


def make_model(path: Path, name: str = "llama", **changes: Any) -> Path:
    """A tiny model with a byte-level tokenizer, as a Hugging Face folder."""
    from lamina.lab.load import quiet
    from lamina.testing.models import tiny
    from lamina.testing.tools import tokenizer

    model: Any = tiny(name, vocab_size=300, **changes)
    with quiet():
        model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def make_text(path: Path, seed: int, words: int = 600) -> Path:
    """Words in random order."""
    draw = random.Random(seed)
    path.write_text(" ".join(draw.choice(WORDS.split()) for _ in range(words)), encoding="utf-8")
    return path


def make_bench(folder: Path) -> Path:
    """`model/`, `calibration.txt` and `heldout.txt` in one folder."""
    make_model(folder / "model")
    make_text(folder / "calibration.txt", 1)
    make_text(folder / "heldout.txt", 2)
    return folder


def thin_command(bench: Path, out: Path, *more: str, model: str = "model") -> list[str]:
    """`lamina thin` on the bench's model and texts."""
    texts = ("--text", str(bench / "calibration.txt"), "--heldout", str(bench / "heldout.txt"))
    return ["thin", str(bench / model), "--out", str(out), *texts, *SHORT, *more]


def no_contract(folder: Path, model: Any, ids: Any, **_: Any) -> tuple[Evidence, ...]:
    """Stands for the reload contract, which costs a fresh process each time."""
    assert (folder / "config.json").is_file()
    return (Evidence(name="reload_logits", value=0.0, of="contract", high=1e-6, n=ids.numel()),)


def make_quick(monkeypatch: Any) -> None:
    """Leave out what takes seconds and is tested elsewhere: the contract's fresh process, and times."""
    monkeypatch.setattr("lamina.evaluators.reload.contract", no_contract)
    monkeypatch.setattr("lamina.pipeline.verbs.EVALUATORS", ("quality", "size"))


def caller(capsys: Any) -> Callable[..., tuple[int, str, str]]:
    """A function that runs a command line in this process: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        from lamina.cli import main

        capsys.readouterr()
        try:
            main([str(a) for a in arguments])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        found = capsys.readouterr()
        return code, found.out, found.err

    return call


def refused(result: tuple[int, str, str], *words: str) -> str:
    """The one line with which a command was refused; it holds all the words."""
    code, _, err = result
    assert code == 2, err
    assert "Traceback" not in err
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: "), err
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


def contents(folder: Path, *without: str) -> dict[str, bytes]:
    """Every file of a folder with its bytes, but those below `without`."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {k: v for k, v in found.items() if k.split("/")[0] not in without}


def left_behind(folder: Path) -> list[str]:
    """What a run must not leave: temporary files, drafts, states of half-done work."""
    verbs = ("survey", "plan", "apply", "heal", "prove", "export", "contract")
    notes = {f"{v}.json" for v in verbs} | {"survey", "tasks"}
    odd = [p for p in folder.rglob("*") if p.name.endswith(".tmp") or p.name in ("draft", "previous")]
    odd += [p for p in (folder / ".state").glob("*") if p.name not in notes]
    odd += [p for p in (folder / ".state" / "survey").glob("*") if p.suffix != ".json"]
    return sorted({p.relative_to(folder).as_posix() for p in odd})


def attribute(target: str) -> tuple[Any, str, Callable[..., Any]]:
    """The owner, the name and the value of `module:path.to.function`."""
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *way, name = path.split(".")
    for part in way:
        owner = getattr(owner, part)
    return owner, name, getattr(owner, name)


class Zygote:
    """A process that has imported everything and forks itself for every command: see zygote.py."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.jobs = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, str(ZYGOTE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, arguments: Sequence[str], *, at: str = "", **hook: Any) -> tuple[int, str, str]:
        """Exit code (negative: the signal), standard output and standard error of `lamina ARGUMENTS`.

        `at` names a function; before its call number `call` (or `after` it) the process gets `signal`. `to`: only
        calls whose last argument is a path of that name count.
        """
        self.jobs += 1
        out, err = (self.folder / f"{self.jobs}.{stream}" for stream in ("out", "err"))
        job = {"arguments": list(arguments), "out": str(out), "err": str(err), "at": at, **hook}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        code = json.loads(self.process.stdout.readline())
        return code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8")

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()
