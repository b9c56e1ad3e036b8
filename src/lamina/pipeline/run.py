"""A run: one folder that holds what was asked, decided, done and measured, and that any verb can take up again."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.core.documents import EvidenceFile, ModelRef, Plan, Receipts, Recipe
from lamina.core.errors import InputError, LaminaError
from lamina.core.files import atomic, fingerprint, sweep, to_json, to_yaml, write_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from lamina.anatomy import Anatomy
    from lamina.lab import Lab
    from lamina.lab.load import Loaded
    from lamina.lab.texts import Tokens

Progress = Callable[[str, int, int], None]
MADE = ("plan.yaml", "receipts.json", "model")
"""What a run has decided and done: while there is none of it, another recipe may take the folder over."""
RESULTS = ("evidence.json", "ladder.json", "model.gguf", "model.Modelfile", "speed.json", "report.html")
"""What is known of `model/`, and goes when another checkpoint is published."""
SMALL = 1 << 20
"""Bytes up to which a file of a published folder is read to tell whether it was changed."""
UNWRITABLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM})


def quiet(what: str, done: int, total: int) -> None:
    """No progress shown."""


@dataclass
class Run:
    """A run folder, and what is already loaded of it.

    `model` is the dense model where the user gave one in memory. A verb is done when `.state/VERB.json` names the
    fingerprint of its inputs and its outputs are there; a killed verb has left no such note and is run again.
    `receipts.json` is there only while it tells what `model/` is: it goes before a checkpoint is replaced.
    """

    folder: Path
    recipe: Recipe
    model: nn.Module | None = None
    tokenizer: Any = None
    progress: Progress = quiet
    say: Callable[[str], None] = lambda line: None
    streamed: bool = False
    """Whether the dense model is read block by block from disk, and never held."""
    any_kind: bool = False
    """Whether the dense model may be other than a causal language model, as it may for a survey."""
    built: bool = field(default=False, repr=False)
    """Whether the thinned model was made here, and not read back from `model/`."""
    _thinned: nn.Module | None = field(default=None, repr=False)
    _unsaved: bool = field(default=False, repr=False)

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
        """Begin a run, or take it up where the folder holds the same recipe.

        Nothing is written before the first verb has something to do. Raises InputError for a folder that holds other
        things, or a plan of another recipe.
        """
        folder = Path(folder)
        path = folder / "recipe.yaml"
        if folder.exists() and not folder.is_dir():
            raise InputError("a run needs a folder, and this is a file", where=folder)
        if not path.is_file() and folder.exists() and any(not _left(p) for p in folder.iterdir()):
            raise InputError("the folder is not empty and holds no run", where=folder, hint="choose another --out")
        there = Recipe.load(path) if path.is_file() else None
        if there is not None and dataclasses.replace(there, heal=None) == recipe:
            recipe = there  # healed since
        same = there == recipe
        if not same and path.is_file() and any((folder / name).exists() for name in MADE):
            hint = f"choose another --out, or change this run: lamina plan {folder} --keep …"
            raise InputError("the folder holds a run of another recipe", where=folder, hint=hint)
        run = cls(folder, recipe, **options)
        run._unsaved = not same
        if same:
            sweep(folder)
        return run

    def begin(self) -> None:
        """Make the folder and write the recipe, if that is still to be done."""
        if self._unsaved:
            write_text(self.folder / "recipe.yaml", to_yaml(self.recipe.to_data()))
            sweep(self.folder)
            self._unsaved = False

    def change(self, **changes: Any) -> None:
        """Change the recipe; what stands on the old one is found out of date by its verb."""
        if changes:
            self.recipe = dataclasses.replace(self.recipe, **changes)
            self._unsaved = True
            self.begin()

    def path(self, name: str) -> Path:
        """A file of the run folder."""
        return self.folder / name

    @cached_property
    def state(self) -> Path:
        """Where notes on done verbs and half-done work are kept."""
        self.begin()
        path = self.folder / ".state"
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(path, error) from error
        sweep(path)
        return path

    def log(self, line: str) -> None:
        """One line to log.txt, with the time; a disk that takes no more of it is not its business."""
        self.begin()
        with contextlib.suppress(OSError), (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    @contextlib.contextmanager
    def verb(self, name: str, inputs: Sequence[object], outputs: Sequence[str], **facts: Any) -> Iterator[bool]:
        """Yields whether there is work to do; on a good end the verb is noted as done, with `facts`.

        Raises InputError where the disk takes no more.
        """
        mark = fingerprint(*inputs)
        if self.done(name, mark, outputs):
            self.say(f"{name}: done already")
            self.log(f"{name}: done already")
            yield False
            return
        self.begin()
        self.log(f"{name} begins")
        began = time.monotonic()
        try:
            with self._alone(), self._watched(name):
                yield True
        except Exception as error:
            if isinstance(error, LaminaError) or _errno(error) not in UNWRITABLE:
                raise
            raise _unwritable(getattr(error, "filename", None) or self.folder, error) from error
        self._note(name, {"inputs": mark, **facts}, outputs)
        self.log(f"{name} done in {time.monotonic() - began:.1f} s")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside, no other process works in the folder. Raises InputError where one does."""
        try:
            import fcntl
        except ImportError:  # a system without such locks
            yield
            return
        folder = os.open(self.state, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                hint = "wait for it, or choose another --out"
                raise InputError("another lamina is at work in this folder", where=self.folder, hint=hint) from None
            except OSError:  # a file system without locks
                pass
            yield
        finally:
            os.close(folder)

    @contextlib.contextmanager
    def _watched(self, name: str) -> Iterator[None]:
        """Inside, progress is also written down for `lamina watch`."""
        from lamina.pipeline.live import live

        shown = self.progress
        with live(self.state, name, shown) as noted:
            self.progress = noted
            try:
                yield
            finally:
                self.progress = shown

    def _note(self, name: str, facts: Mapping[str, Any], outputs: Sequence[str]) -> None:
        prints = {o: _print(self.folder / o) for o in outputs if (self.folder / o).exists()}
        write_text(self.state / f"{name}.json", to_json({**facts, "outputs": prints}))

    def hand_on(self, name: str) -> None:
        """Note that what a verb put out has been taken further: as it stands now, that verb is still done."""
        known = self.noted(name)
        if known is not None:
            self._note(name, known, list(known["outputs"]))

    def done(self, name: str, inputs: str, outputs: Sequence[str]) -> bool:
        """Whether the verb was run on these inputs and its outputs are there, unchanged or (a plan) edited by hand."""
        known = self.noted(name)
        if known is None or known.get("inputs") != inputs or not all((self.folder / o).exists() for o in outputs):
            return False
        if not self.changed(name):
            return True
        if name == "plan":
            self.say("plan: edited by hand, taken as it is")
        return name == "plan"

    def changed(self, name: str) -> bool:
        """Whether something that a verb put out is not what it was then."""
        known = self.noted(name) or {}
        return any(_print(self.folder / o) != mark for o, mark in known.get("outputs", {}).items())

    def noted(self, name: str) -> Mapping[str, Any] | None:
        """What is noted of a verb, if anything."""
        try:
            known = json.loads((self.folder / ".state" / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return known if isinstance(known, dict) and isinstance(known.get("outputs"), dict) else None

    # What the verbs work on, loaded when first needed.

    @cached_property
    def loaded(self) -> Loaded:
        """The dense model."""
        from lamina.lab.load import load

        r = self.recipe
        spec: Any = self.model if self.model is not None else r.model
        self.say(f"loading {r.model}")
        return load(
            spec, dtype=r.dtype, device=r.device, trust_remote_code=r.trust_remote_code, tokenizer=self.tokenizer,
            streamed=self.streamed, any_kind=self.any_kind,
        )  # fmt: skip

    @property
    def ref(self) -> ModelRef:
        """The dense model's name and fingerprint."""
        return ModelRef(name=self.loaded.name, fingerprint=self.loaded.fingerprint)

    @cached_property
    def tokens(self) -> Tokens:
        """Calibration and held-out blocks."""
        from lamina.lab.texts import prepare, prepare_inputs
        from lamina.pipeline.checks import check_length

        if (given := prepare_inputs(self.recipe.data)) is not None:
            return given
        check_length(self.recipe, self.loaded.model)
        tokens = prepare(self.recipe.data, self.loaded.tokenizer, seed=self.recipe.seed)
        for warning in tokens.warnings:
            self.say(f"warning: {warning}")
            self.log(f"warning: {warning}")
        return tokens

    @cached_property
    def anatomy(self) -> Anatomy:
        """The dense model's anatomy, certified."""
        from lamina.anatomy import Anatomy
        from lamina.lab.lab import sample_of

        sample = sample_of(self.tokens.calibration)
        if self.streamed:
            from lamina.lab.disk import anatomy_of

            anatomy = anatomy_of(self.loaded.model, sample)
        else:
            anatomy = Anatomy.of(self.loaded.model, sample)
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

            if not ((self.path("model") / "config.json").is_file() and self.path("receipts.json").is_file()):
                raise InputError("model/ or its receipts are missing", where=self.folder, hint="run lamina apply first")
            dtype = str(next(self.loaded.model.parameters()).dtype).removeprefix("torch.")
            found = load(self.path("model"), dtype=dtype, device=self.recipe.device, trust_remote_code=True)
            self._thinned, self.built = found.model, False
        return self._thinned

    def adopt(self, model: nn.Module | None) -> None:
        """Use this as the thinned model from now on; None: what `model/` holds, read again when needed."""
        self._thinned, self.built = model, model is not None

    def publish(self, draft: Path, receipts: Receipts) -> None:
        """Put a checked checkpoint in the place of `model/`, and its receipts beside it.

        The receipts are on the disk before the old ones go, and take their place last: a kill in between leaves a
        folder without receipts, in which `apply` begins anew.
        """
        with atomic(self.path("receipts.json")) as written:
            written.write_text(to_json(receipts.to_data()), encoding="utf-8")
            for name in ("receipts.json", *RESULTS):
                self.path(name).unlink(missing_ok=True)
            with atomic(self.path("model")) as place:
                shutil.move(str(draft), place)


def _left(path: Path) -> bool:
    """Whether this is what a kill leaves of a run that had only begun."""
    return path.match(".recipe.yaml.*.tmp")


def _errno(error: Exception) -> int | None:
    """The operating system's number of an error; libraries in Rust tell it in their words alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _unwritable(where: object, error: Exception) -> InputError:
    hint = "make room, then the same command goes on from here"
    why = os.strerror(_errno(error) or errno.EIO)
    return InputError(f"can't write: {why}", where=where, hint=hint)


def _print(path: Path) -> str:
    """The fingerprint of an output; of a folder, of names and sizes, and of what its small files hold."""
    if not path.is_dir():
        return fingerprint(path) if path.is_file() else ""
    files = sorted(p for p in path.rglob("*") if p.is_file())
    marks: list[object] = []
    for file in files:
        size = file.stat().st_size
        marks += [(str(file.relative_to(path)), size), *([file] if size <= SMALL else [])]
    return fingerprint(*marks)
