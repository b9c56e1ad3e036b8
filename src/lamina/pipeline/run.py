"""A run: one folder that holds what was asked, decided, done and measured, and that any verb can take up again."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.core.documents import EvidenceFile, ModelRef, Plan, Receipts, Recipe
from lamina.core.errors import InputError
from lamina.core.files import atomic, fingerprint, sweep, to_json, to_yaml, write_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from lamina.anatomy import Anatomy
    from lamina.lab import Lab
    from lamina.lab.load import Loaded
    from lamina.lab.texts import Tokens

Progress = Callable[[str, int, int], None]
PARTS = {"recipe": "recipe.yaml", "plan": "plan.yaml", "survey": "survey.parquet", "receipts": "receipts.json"}


def quiet(what: str, done: int, total: int) -> None:
    """No progress shown."""


@dataclass
class Run:
    """A run folder, and what is already loaded of it.

    `model` is the dense model where the user gave one in memory. A verb is done when `.state/VERB.json` names the
    fingerprint of its inputs and its outputs are there; a killed verb has left no such note and is run again.
    """

    folder: Path
    recipe: Recipe
    model: nn.Module | None = None
    tokenizer: Any = None
    progress: Progress = quiet
    say: Callable[[str], None] = lambda line: None
    _thinned: nn.Module | None = field(default=None, repr=False)

    @classmethod
    def open(cls, folder: Path | str, **options: Any) -> Run:
        """Take up a run folder. Raises InputError where there is none."""
        folder = Path(folder)
        if not (folder / "recipe.yaml").is_file():
            raise InputError(
                "this is no run folder: it has no recipe.yaml", where=folder, hint="lamina thin MODEL makes one"
            )
        sweep(folder)
        return cls(folder, Recipe.load(folder / "recipe.yaml"), **options)

    @classmethod
    def start(cls, folder: Path | str, recipe: Recipe, **options: Any) -> Run:
        """Begin a run, or take it up where the folder holds the same recipe; another recipe is an error."""
        folder = Path(folder)
        path = folder / "recipe.yaml"
        if folder.exists() and not folder.is_dir():
            raise InputError("a run needs a folder, and this is a file", where=folder)
        if path.is_file():
            if Recipe.load(path) != recipe:
                raise InputError("the folder holds a run of another recipe", where=folder, hint="choose another --out")
        elif folder.exists() and any(folder.iterdir()):
            raise InputError("the folder is not empty and holds no run", where=folder, hint="choose another --out")
        if not path.is_file():
            write_text(path, to_yaml(recipe.to_data()))
        sweep(folder)
        return cls(folder, recipe, **options)

    def change(self, **changes: Any) -> None:
        """Change the recipe; what stands on the old one is found out of date by its verb."""
        if changes:
            self.recipe = dataclasses.replace(self.recipe, **changes)
            write_text(self.folder / "recipe.yaml", to_yaml(self.recipe.to_data()))

    def path(self, name: str) -> Path:
        """A file of the run folder."""
        return self.folder / name

    @cached_property
    def state(self) -> Path:
        """Where notes on done verbs and half-done work are kept."""
        path = self.folder / ".state"
        path.mkdir(parents=True, exist_ok=True)
        sweep(path)
        return path

    def log(self, line: str) -> None:
        """One line to log.txt, with the time."""
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    @contextmanager
    def verb(self, name: str, inputs: Sequence[object], outputs: Sequence[str]) -> Iterator[bool]:
        """Yields whether there is work to do; on a good end the verb is noted as done."""
        note = self.state / f"{name}.json"
        wanted = {"inputs": fingerprint(*inputs)}
        if self.done(name, wanted["inputs"], outputs):
            self.say(f"{name}: done already")
            yield False
            return
        self.log(f"{name} begins")
        began = time.monotonic()
        yield True
        prints = {o: _print(self.folder / o) for o in outputs if (self.folder / o).exists()}
        write_text(note, to_json({**wanted, "outputs": prints}))
        self.log(f"{name} done in {time.monotonic() - began:.1f} s")

    def done(self, name: str, inputs: str, outputs: Sequence[str]) -> bool:
        """Whether the verb was run on these inputs and its outputs are there, unchanged or edited by hand."""
        note = self.state / f"{name}.json"
        try:
            known = json.loads(note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        if known.get("inputs") != inputs or not all((self.folder / o).exists() for o in outputs):
            return False
        changed = [o for o in outputs if _print(self.folder / o) != known["outputs"].get(o)]
        if changed and name == "plan":
            self.say("plan: edited by hand, taken as it is")
            return True
        return not changed

    def noted(self, name: str) -> Mapping[str, Any] | None:
        """What is noted of a verb, if anything."""
        try:
            return json.loads((self.state / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    # What the verbs work on, loaded when first needed.

    @cached_property
    def loaded(self) -> Loaded:
        """The dense model."""
        from lamina.lab.load import load

        r = self.recipe
        spec: Any = self.model if self.model is not None else r.model
        self.say(f"loading {r.model}")
        return load(
            spec, dtype=r.dtype, device=r.device, trust_remote_code=r.trust_remote_code, tokenizer=self.tokenizer
        )

    @property
    def ref(self) -> ModelRef:
        """The dense model's name and fingerprint."""
        return ModelRef(name=self.loaded.name, fingerprint=self.loaded.fingerprint)

    @cached_property
    def tokens(self) -> Tokens:
        """Calibration and held-out blocks."""
        from lamina.lab.texts import prepare

        tokens = prepare(self.recipe.data, self.loaded.tokenizer, seed=self.recipe.seed)
        for warning in tokens.warnings:
            self.say(f"warning: {warning}")
            self.log(f"warning: {warning}")
        return tokens

    @cached_property
    def anatomy(self) -> Anatomy:
        """The dense model's anatomy, certified."""
        from lamina.anatomy import Anatomy

        anatomy = Anatomy.of(self.loaded.model)
        certificate = anatomy.certify()
        self.log(f"anatomy certified: worst error {certificate.worst:.1e} of {certificate.tolerance:.0e}")
        return anatomy

    def lab(self, split: str = "calibration") -> Lab:
        """The dense model on one split of the text."""
        from lamina.lab import Lab

        text = getattr(self.tokens, split)
        return Lab(self.loaded.model, text, anatomy=self.anatomy, seed=self.recipe.seed, progress=self.progress)

    def plan(self) -> Plan:
        """The plan, checked against the model it was made for."""
        plan = self._read("plan.yaml", Plan)
        if plan.model.fingerprint != self.loaded.fingerprint:
            raise InputError(
                f"the plan was made for {plan.model.name} ({plan.model.fingerprint[:15]}…), not for this model",
                where=self.path("plan.yaml"),
                hint="plan again",
            )
        return plan

    def receipts(self) -> Receipts:
        """The receipts."""
        return self._read("receipts.json", Receipts)

    def evidence(self) -> EvidenceFile:
        """The evidence."""
        return self._read("evidence.json", EvidenceFile)

    def _read(self, name: str, kind: Any) -> Any:
        if not self.path(name).is_file():
            verb = {"plan.yaml": "plan", "receipts.json": "apply", "evidence.json": "prove"}[name]
            raise InputError(f"{name} is missing", where=self.folder, hint=f"run lamina {verb} first")
        return kind.load(self.path(name))

    @property
    def thinned(self) -> nn.Module:
        """The thinned model as `model/` holds it."""
        if self._thinned is None:
            from lamina.lab.load import load

            if not (self.path("model") / "config.json").is_file():
                raise InputError("model/ is missing", where=self.folder, hint="run lamina apply first")
            dtype = str(next(self.loaded.model.parameters()).dtype).removeprefix("torch.")
            found = load(self.path("model"), dtype=dtype, device=self.recipe.device, trust_remote_code=True)
            self._thinned = found.model
        return self._thinned

    def adopt(self, model: nn.Module) -> None:
        """Use this as the thinned model from now on."""
        self._thinned = model

    def publish(self, draft: Path) -> None:
        """Put a checked checkpoint in the place of `model/`."""
        with atomic(self.path("model")) as place:
            shutil.move(str(draft), place)


def _print(path: Path) -> str:
    """The fingerprint of an output; of a folder of weights, names and sizes and its small files."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        return fingerprint(*[(str(p.relative_to(path)), p.stat().st_size) for p in files])
    return fingerprint(path)
