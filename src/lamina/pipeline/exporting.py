"""Exports of a run: written aside, tried where the engine is at hand, and only then put in place."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.core import registry
from lamina.core.documents import Budget, EvidenceFile, Plan, Receipts
from lamina.core.errors import InputError, LaminaError, ReloadError
from lamina.core.files import atomic, fingerprint, read_data, write_text
from lamina.core.papers import Paper
from lamina.exporters._hf_card import Facts, More, card
from lamina.exporters.ladder import FILE, Ladder, Rung

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lamina.pipeline.run import Run

ROWS, TOKENS = 2, 32
"""Of the calibration text, on which exports are tried."""
CONTEXT = 8192
"""The longest context that a Modelfile asks for, since Ollama makes room for all of it."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """What exporters ask for beside the model: see their `export`."""

    receipts: Receipts
    budget: Budget
    name: str
    tokenizer: Any
    source: str
    path: Path | None
    dense: nn.Module
    sample: Tensor


def export(run: Run, to: Path | None = None, kind: str = "hf", options: dict[str, Any] | None = None) -> list[Path]:
    """Write the thinned model for another engine; `model/` is the Hugging Face checkpoint already.

    Folders come with a model card, GGUF files with a Modelfile. Where the engine is installed it must give the model's
    own numbers first. Raises ReloadError where it does not, and InputError for a folder that holds other things.
    """
    receipts = run.receipts()
    exporter = registry.EXPORTERS.make(kind, options)
    for problem in exporter.check(receipts.receipts):
        raise problem.error()
    if kind == "hf" and to is None:
        return [run.path("model")]
    if kind == "hf" and options:
        raise InputError("options have no effect: model/ is copied as it was checked", where="export to hf")
    place = Path(to) if to is not None else run.path("model.gguf" if kind == "gguf" else kind)
    if to is not None and place.exists() and not (place.is_file() or (place.is_dir() and not any(place.iterdir()))):
        raise InputError("there is something here already", where=place, hint="choose a new folder")
    alone = kind == "gguf" and place.suffix == ".gguf"
    with atomic(place) as draft:
        _written(run, receipts, exporter, kind, draft)
        if not alone:
            _dressed(run, receipts, kind, draft)
    if alone:
        note = place.with_suffix(".Modelfile")
        write_text(note, _modelfile(run, place.name))
        return [note, place]
    return sorted(p for p in place.rglob("*") if p.is_file())


def _written(run: Run, receipts: Receipts, exporter: Any, kind: str, draft: Path) -> None:
    """The exporter's files, tried."""
    if kind == "hf":
        if not (run.path("model") / "config.json").is_file():
            raise InputError("model/ is missing", where=run.folder, hint="run lamina apply first")
        shutil.copytree(run.path("model"), draft)
        return
    dense = run.loaded
    sample = run.tokens.calibration[:ROWS, :TOKENS]
    made = Made(
        receipts=receipts, budget=run.recipe.budget, name=dense.name, tokenizer=dense.tokenizer, source=dense.source,
        path=dense.path, dense=dense.model, sample=sample,
    )  # fmt: skip
    exporter.export(run.thinned, made, draft)
    if kind in TRIALS and (rung := TRIALS[kind](run, draft, sample)) is not None:
        note(run, receipts, rung)


def _tried_gguf(run: Run, draft: Path, sample: Tensor) -> Rung | None:
    """llama.cpp continues some text as the model does."""
    from lamina.exporters._gguf_run import available, run_check

    if not available():
        run.say("llama.cpp is not installed (pip install xllamacpp): the file was not run here")
        return None
    path = draft if draft.is_file() else draft / "model.gguf"
    rounded = any("type" in r.options for r in run.receipts().receipts)
    run.say("running the file in llama.cpp")
    try:
        wrong = run_check(path, run.thinned, sample, rounded=rounded)
    except TimeoutError as error:
        run.say(f"{error}: not run here to the end")
        return None
    if wrong:
        raise ReloadError(wrong, where=path.name)
    return Rung(target="llama.cpp", ok=True, why="GGUF", ran=True)


def _tried_deci(run: Run, draft: Path, sample: Tensor) -> None:
    """The folder's own code, in transformers, gives the model's logits and keeps the reload contract."""
    import torch

    from lamina.evaluators.reload import SAME, contract
    from lamina.lab.load import load_weights

    run.say("checking that the folder reloads in a fresh process, by its own code")
    model: Any = run.thinned
    own: Any = load_weights(draft, dtype=next(model.parameters()).dtype, trust_remote_code=True).eval()
    with torch.no_grad():
        due, found = (m(input_ids=sample, use_cache=False).logits for m in (model, own))
    apart, bound = float((due - found).abs().max()), SAME * torch.finfo(due.dtype).eps * float(due.abs().max())
    if not apart <= bound:
        raise ReloadError(f"the logits differ by {apart:.2g} (at most {bound:.1g})", where=draft.name)
    contract(draft, own, sample)


def _tried_onnx(run: Run, draft: Path, sample: Tensor) -> Rung:
    return Rung(target="onnxruntime", ok=True, why="logits of whole texts, without a cache", ran=True)


TRIALS: Mapping[str, Callable[[Run, Path, Tensor], Rung | None]] = {
    "gguf": _tried_gguf,
    "deci": _tried_deci,
    "onnx": _tried_onnx,  # the exporter has compared it
}
"""Exporter → how what it wrote is tried; gives the rung of the target that ran."""


def note(run: Run, receipts: Receipts, rung: Rung) -> None:
    """Note in `ladder.json` that a target ran."""
    known = noted(run, receipts) or Ladder(receipts=fingerprint(receipts.to_data()), rungs=())
    older = next((r for r in known.rungs if r.target == rung.target), None)
    rung = dataclasses.replace(older, ran=True) if older else rung
    known.with_rung(rung).save(run.path(FILE))


def noted(run: Run, receipts: Receipts) -> Ladder | None:
    """The ladder that is noted of these receipts, if any."""
    try:
        found = Ladder.load(run.path(FILE)) if run.path(FILE).is_file() else None
    except LaminaError:
        return None
    return found if found is not None and found.receipts == fingerprint(receipts.to_data()) else None


def _modelfile(run: Run, name: str) -> str:
    from lamina.exporters._ollama import modelfile

    model: Any = run.thinned
    most = getattr(model.config, "max_position_embeddings", None)
    generation = getattr(model, "generation_config", None)
    return modelfile(name, run.loaded.tokenizer, generation, min(most, CONTEXT) if isinstance(most, int) else None)


def _dressed(run: Run, receipts: Receipts, kind: str, folder: Path) -> None:
    """The model card, and beside a GGUF file its Modelfile."""
    from lamina.exporters.hf import settle

    if kind == "gguf":
        (folder / "Modelfile").write_text(_modelfile(run, "model.gguf"), encoding="utf-8")
    more = More(
        plan=Plan.load(run.path("plan.yaml")) if run.path("plan.yaml").is_file() else None,
        evidence=EvidenceFile.load(run.path("evidence.json")) if run.path("evidence.json").is_file() else None,
        papers=papers(run, receipts),
        licence=licence(run),
        loading=LOADING.get(kind, ()),
        library={"gguf": "gguf", "onnx": "onnx"}.get(kind, "transformers"),
    )
    shape, architecture, loader = _published(run)
    tokenizer = (run.path("model") / "tokenizer_config.json").is_file()
    facts = Facts(
        receipts.model.name, architecture, shape, receipts.receipts, run.recipe.budget, summary(receipts.healed),
        tokenizer, loader,
    )  # fmt: skip
    (folder / "README.md").write_text(card(facts, more), encoding="utf-8")
    settle(folder)


def _published(run: Run) -> tuple[str, str, str]:
    """Of `model/`, by its config: `stock` or `shim`, the dense model's class, and the Auto class that loads it."""
    import transformers

    from lamina.rewrites.structure import auto_class

    data = read_data(run.path("model") / "config.json")
    if "lamina" in data:
        loader = next((n for n in data.get("auto_map", ()) if n.startswith("AutoModel")), "AutoModel")
        return "shim", str(data["lamina"]["model_class"]), loader
    name = str((data.get("architectures") or ["AutoModel"])[0])
    kind = getattr(transformers, name, None)
    return "stock", name, auto_class(kind, name) if kind is not None else name


LOADING: Mapping[str, tuple[str, ...]] = {
    "gguf": ("```sh", "llama-cli -m model.gguf", "ollama create thinned -f Modelfile", "```"),
    "deci": (
        "A DeciLM (Nemotron-NAS) folder. `modeling_decilm.py` holds its config, which vLLM reads too, and its model in",
        "transformers; it needs torch and transformers, not lamina. Read it before you trust it.", "",
        "```sh", "vllm serve path/to/this/folder --trust-remote-code", "```", "", "```python",
        "from transformers import AutoModelForCausalLM", "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto", trust_remote_code=True)',
        "```",
    ),
    "onnx": (
        "`input_ids` and `attention_mask` [batch, tokens] give `logits` [batch, tokens, vocabulary], in float32,",
        "without a cache.", "", "```python", "import onnxruntime", "",
        'session = onnxruntime.InferenceSession("model.onnx")',
        'logits = session.run(None, {"input_ids": ids, "attention_mask": mask})[0]', "```",
    ),
    "patch": (
        "`patch.json` holds what was done, `changed.safetensors` the tensors that it does not explain. With the base",
        "they make the thinned model, bit for bit:", "",
        "```sh", "lamina apply BASE path/to/this/folder --to DIR", "```",
    ),
}  # fmt: skip
"""How the card of each exporter's folder says that it is loaded."""


def summary(healed: Mapping[str, Any]) -> dict[str, Any]:
    """What the model card says of the healing: all but the course of the loss."""
    return {k: v for k, v in healed.items() if k != "history"}


def papers(run: Run, receipts: Receipts) -> tuple[Paper, ...]:
    """The papers of the recipe, its measure, the rewrites and the healer, each once."""
    row = registry.rows().get(run.recipe.name)
    found: list[Paper | None] = [row.paper if row else None]
    if row is not None and row.measure:
        found.append(registry.MEASURES.card(row.measure).paper)
    known = set(registry.REWRITES)
    found += [registry.REWRITES.card(r.rewrite).paper for r in receipts.receipts if r.rewrite in known]
    healer = receipts.healed.get("healer")
    if healer in set(registry.HEALERS):
        found.append(registry.HEALERS.card(str(healer)).paper)
    return tuple({p.key: p for p in found if p is not None}.values())


def licence(run: Run) -> str:
    """The base's licence, as the shelf or the front matter of its model card tells it; empty where neither does."""
    from lamina.lab.shelf import shelf

    if run.recipe.model in shelf():
        return shelf()[run.recipe.model].licence
    readme = Path(run.recipe.model).expanduser() / "README.md"
    if not readme.is_file():
        return ""
    head = readme.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
    rows = (line.partition(":") for line in head.splitlines())
    return next((value.strip() for key, _, value in rows if key == "license"), "")
