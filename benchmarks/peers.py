"""lamina beside its peers: each in an environment of its own, on the same model and the same tokens.

    python benchmarks/peers.py [--only mergekit,lamina] [--work DIR] [--llm-drop CHECKOUT]
        [--calibration FILE] [--heldout FILE] [--sequences 8] [--rounds 3]

Writes PEERS.md beside this script, from what this run measured and nothing else. Every peer runs by its own code and
options, pinned; each checkpoint is then loaded by transformers in a fresh process and judged by one script: perplexity
of 8 x 512 held-out tokens, speed beside the dense model in turn, missing tensors. mergekit has no measure, and is
told the run of blocks of least angular distance. LLM-Drop is no package: clone github.com/CASE-Lab-UMD/LLM-Drop at
28b5dd1 and pass the folder; what it picks is dropped by lamina.
"""

from __future__ import annotations

import datetime
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import arguments, machine, opened, table, text

from lamina.core.files import write_text

HERE = Path(__file__).parent
SCRIPTS = HERE / "peer_scripts"
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Peer:
    """A tool, the packages of its environment, whose environment its checkpoints are judged in, tasks: name → what."""

    name: str
    pins: tuple[str, ...]
    tasks: dict[str, str] = field(default_factory=dict)
    judge: str = "torch-pruning"


PEERS = (
    Peer("mergekit", ("mergekit==0.1.5",), {"blocks-8": "8 blocks dropped"}),
    Peer(
        "torch-pruning",
        ("torch-pruning==1.6.1", "transformers==5.23.0"),
        {"neurons-25": "a quarter of the MLPs' neurons"},
    ),
    Peer(
        "llmcompressor",
        ("llmcompressor==0.14.0.1",),
        {
            "sparsegpt-50": "half the weights zero",
            "sparsegpt-2:4": "2:4 masks",
            "gptq": "4 bits, GPTQ, groups of 64",
        },
        judge="llmcompressor",
    ),
    Peer(
        "modelopt",
        ("nvidia-modelopt[hf]==0.47.0",),
        {"sparsegpt-2:4": "2:4 masks", "int8": "8 bits, rounded"},
        judge="modelopt",
    ),
    Peer(
        "llm-drop",
        ("transformers==4.44.2", "accelerate==1.15.0", "numpy<2"),
        {
            "attention-8": "8 attentions dropped",
            "attention-15": "15 attentions dropped",
            "block-3": "3 blocks dropped",
            "block-8": "8 blocks dropped",
        },
    ),
    Peer(
        "lamina",
        (),
        {
            "blocks-3": "3 blocks dropped",
            "blocks-8": "8 blocks dropped",
            "attention-8": "8 attentions dropped",
            "attention-15": "15 attentions dropped",
            "neurons-25": "a quarter of the MLPs' neurons",
            "sparsegpt-50": "half the weights zero",
            "sparsegpt-2:4": "2:4 masks",
            "gptq-Q4_0": "4 bits, GPTQ, groups of 32",
            "round-Q8_0": "8 bits, rounded",
        },
        judge="lamina",
    ),
)
BY_NAME = {p.name: p for p in PEERS}
OWN = frozenset({"lamina"})
"""These run in the environment of this script."""


def python(peer: Peer, work: Path) -> str:
    """The interpreter of a peer's environment, made at first use."""
    if peer.name in OWN:
        return sys.executable
    home, pins = work / "environments" / peer.name, [TORCH, *peer.pins]
    stamp = home / "pins.txt"
    if not stamp.is_file() or stamp.read_text() != "\n".join(pins):
        print(f"{peer.name}: making its environment", flush=True)
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        for part in ([TORCH], list(peer.pins)):
            subprocess.run([home / "bin/python", "-m", "pip", "install", "--quiet", *part], check=True)
        stamp.write_text("\n".join(pins))
    return str(home / "bin/python")


def last(command: list[str], threads: int) -> tuple[dict[str, Any] | None, str]:
    """The JSON of a script's last line, and its last word where it failed."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(SCRIPTS)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    lines = [x for x in done.stdout.splitlines() if x.strip()]
    if done.returncode or not lines:
        said = [x for x in done.stderr.splitlines() if x.strip()]
        return None, (said[-1] if said else f"exit {done.returncode}")[:160]
    return json.loads(lines[-1]), ""


@dataclass(frozen=True)
class Bench:
    """Where things lie, and how they are run."""

    work: Path
    given: Any

    def row(self, peer: Peer, task: str, what: str) -> tuple[str, ...]:
        """One line of the table: the peer's own run, then the judge's."""
        out = self.work / "out" / f"{peer.name}-{task}"
        script = SCRIPTS / f"{peer.name.replace('-', '_')}_.py"
        common = ["--model", str(self.work / "dense"), "--calibration", str(self.work / "calibration.safetensors")]
        extra = ["--source", str(self.given.llm_drop)] if peer.name == "llm-drop" else []
        options = [*common, "--sequences", str(self.given.sequences), "--threads", str(self.given.threads)]
        own = [sys.executable, str(SCRIPTS / "lamina_.py"), "--out", str(out), *options, "--task"]
        if peer.name == "mergekit":
            found, error = last([*own, f"span-{task.partition('-')[2]}"], self.given.threads)
            extra = ["--span", *map(str, (found or {}).get("span", ()))]
        made, error = last(
            [python(peer, self.work), str(script), "--task", task, "--out", str(out), *options, *extra],
            self.given.threads,
        )
        if made is None:
            return (what, peer.name, f"failed: {error}", *[""] * 6)
        if "drops" in made:
            last([*own, "drop-" + json.dumps(made["drops"])], self.given.threads)
        found, error = self.judged(peer, out)
        if found is None:
            told = (f"made in {made['seconds']} s, not loaded: {error}", *[""] * 3)
            return (what, peer.name, *told, f"{made['seconds']:.0f}", f"{made['peak_mb']}", "")
        speeds = (f"{m:.2f} [{a:.2f}, {b:.2f}]" for m, a, b in (found["prefill"], found["decode"]))
        loads = "transformers" + (", remote code" if found["remote"] else "")
        if peer.judge not in (Peer.judge, *OWN):
            loads += f" with {peer.judge}"
        if found["missing"]:
            loads += f", {found['missing']} tensors missing"
        loads += self.engines(out)
        numbers = (f"{found['perplexity']:.2f}", f"{found['megabytes']:.1f}", *speeds)
        return (what, peer.name, *numbers, f"{made['seconds']:.0f}", str(made["peak_mb"]), loads)

    def engines(self, out: Path) -> str:
        """What else runs the checkpoint."""
        dense, heldout = str(self.work / "dense"), str(self.work / "heldout.safetensors")
        command = [sys.executable, str(SCRIPTS / "engines.py"), "--dense", dense, "--thin", str(out)]
        found, error = last([*command, "--heldout", heldout], self.given.threads)
        why = error if found is None else found["llama.cpp"]
        if why:
            print(f"{out.name}: not llama.cpp: {why}", flush=True)
        return "" if why else "; llama.cpp"

    def judged(self, peer: Peer, out: Path) -> tuple[dict[str, Any] | None, str]:
        """Quality, size and speed of a checkpoint."""
        by = BY_NAME[peer.judge]
        command = [python(by, self.work), str(SCRIPTS / "judge.py"), "--dense", str(self.work / "dense"), "--thin"]
        text_ = ["--heldout", str(self.work / "heldout.safetensors"), "--rounds", str(self.given.rounds)]
        return last([*command, str(out), *text_, "--threads", str(self.given.threads)], self.given.threads)

    def rows(self) -> Iterator[tuple[str, ...]]:
        """All rows that were asked for."""
        for peer in PEERS:
            if self.given.only and peer.name not in self.given.only.split(","):
                continue
            if peer.name == "llm-drop" and self.given.llm_drop is None:
                yield ("", peer.name, "not run: no checkout was given", *[""] * 6)
                continue
            for task, what in peer.tasks.items():
                row = self.row(peer, task, what)
                print(*row, sep=" | ", flush=True)
                yield row


def prepared(given: Any) -> Path:
    """The folder with the dense model as an ordinary checkpoint and both sets of tokens."""
    from safetensors.torch import save_file

    work: Path = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    loaded = opened(given)
    if not (work / "dense").is_dir():
        loaded.model.save_pretrained(work / "dense")
        loaded.tokenizer.save_pretrained(work / "dense")
    for split in ("calibration", "heldout"):
        ids = text(given, loaded, split, max(given.sequences, 8), 512)
        save_file({"input_ids": ids.contiguous()}, work / f"{split}.safetensors")
    return work


def main() -> None:
    """Write PEERS.md."""
    parser = arguments(__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--work", type=Path, default=HERE / "work" / "peers")
    parser.add_argument("--llm-drop", type=Path)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    bench = Bench(prepared(given), given)
    rows = sorted(bench.rows(), key=lambda r: (list(WHAT).index(r[0]) if r[0] in WHAT else 99, r[1]))
    names = ("what", "tool", "perplexity", "MB", "prefill", "decode", "seconds", "peak MB", "loads in")
    dense = bench.judged(BY_NAME["torch-pruning"], bench.work / "dense")[0] or {}
    words = [Path(w).name if "/" in w else w for w in sys.argv[1:]]
    pins = ", ".join(f"{p.name}: {' '.join(p.pins)}" for p in PEERS if p.pins)
    command = shlex.join(["python", "benchmarks/peers.py", *words])
    head = (
        f"# lamina beside its peers\n\nWritten by `{command}`, {datetime.date.today()}; {machine(given.threads)}.\n\n"
        f"Dense: perplexity {dense.get('perplexity')}, {dense.get('megabytes')} MB. Each tool calibrates on the same "
        f"{given.sequences} x 512 tokens; perplexity is of 8 x 512 held-out ones, untrained; speeds are ratios to "
        "the dense model, median and range of rounds in turn; seconds and peak memory are of the tool's own work, the "
        "model's loading among it. llama.cpp runs a checkpoint where its GGUF file, by lamina's writer, gives the same "
        "greedy tokens as the weights that stand in it, without a tool's own modules; vLLM and TensorRT-LLM need a GPU "
        f"and were not tried. {pins}.\n\n"
    )
    write_text(HERE / "PEERS.md", head + table(names, rows) + "\n")


WHAT = dict.fromkeys(what for peer in PEERS for what in peer.tasks.values())

if __name__ == "__main__":
    main()
