"""What a task is: a function that marks one model on a fixed list of items, and a card that says what it shows.

A task scores one model at a time; lamina runs it on the dense and on the thinned model with the same items and pairs
the marks. A file of this package adds a task by its decorator alone:

    @task("hyperbaton", capability="syntax", of="decoder", data="bigbench")
    def hyperbaton(subject: Subject) -> Marks:
        '''Which of two sentences has its adjectives in the usual order.'''

Heavy imports (torch, transformers) go inside the functions: the table is read by commands that answer at once.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lamina.core.errors import InputError, UnsupportedError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

Array = NDArray[np.float64]
Progress = Callable[[str, int, int], None]
Of = Literal["decoder", "encoder", "vision", "speech", "encoder-decoder"]
"""Kinds of model: a causal language model; token ids in, vectors out; pictures in; sound in; two stacks of text."""
OFFLINE = "offline"
"""The group of the tasks whose data comes with packages: those that fit the model's kind."""


def quiet(what: str, done: int, total: int) -> None:
    """No progress shown."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One model that a task is to mark, and what it is marked with.

    `items` is how many items to draw at most, by `seed`: both models of a pair get the same two numbers, and so must
    meet the same items in the same order. `path` is the folder or file that the dense model was read from (None for
    one in memory), for processors of pictures and sound.
    """

    model: nn.Module
    tokenizer: Any = None
    items: int = 500
    seed: int = 0
    path: Path | None = None
    progress: Progress = quiet


@dataclass(frozen=True, kw_only=True)
class Marks:
    """One model's marks: `values` float64 [items], `keys` what each item is (text, ids: anything that str() tells).

    `chance` is what guessing gives on these items, where guessing means something; `how` says in a few words what was
    run ("length-normalised log-likelihood of 4 choices"). Items that share a text, so that they may fail together, have
    the same number in `groups` [items]; empty: each stands alone.
    """

    values: Array
    keys: tuple[str, ...]
    chance: float | None = None
    how: str = ""
    groups: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        values: ArrayLike,
        keys: Iterable[object],
        *,
        chance: float | None = None,
        how: str = "",
        groups: Iterable[int] = (),
    ) -> Marks:
        """Marks from any sequence of numbers. Raises ValueError unless there is one finite number per item."""
        numbers = np.asarray(values, dtype=np.float64)
        named, shared = tuple(str(k) for k in keys), tuple(int(g) for g in groups)
        made = cls(values=numbers, keys=named, chance=chance, how=how, groups=shared)
        if numbers.ndim != 1 or len(numbers) != len(named) or not named or (shared and len(shared) != len(named)):
            raise ValueError(f"one number per item: {numbers.shape} for {len(named)} items in {len(shared)} groups")
        if not np.isfinite(made.values).all():
            raise ValueError(f"item {int(np.argmin(np.isfinite(made.values)))} has no finite mark")
        return made


@dataclass(frozen=True, kw_only=True)
class Task:
    """The card of one task and the function that does it.

    `metric` is the unit of the marks: "accuracy" is a mean of 0s and 1s; anything else is a mean as it stands
    ("nats/token"). `higher`: whether more is better. `items` is how many there are at most (0: more than any run asks
    for). `data` names what `lamina.lab.datasets` holds; `package` and `licence` are said where it is not from there.
    """

    name: str
    capability: str
    of: tuple[Of, ...]
    score: Callable[[Subject], Marks]
    summary: str = ""
    metric: str = "accuracy"
    higher: bool = True
    items: int = 0
    data: str = ""
    package: str = ""
    licence: str = ""
    groups: tuple[str, ...] = (OFFLINE,)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What both models got on the items of one task, in the same order: float64 [items] each."""

    task: str
    capability: str
    metric: str
    higher: bool
    chance: float | None
    dense: Array
    thinned: Array
    seed: int = 0
    how: str = ""
    keys: tuple[str, ...] = field(default=(), repr=False)
    groups: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.dense.shape != self.thinned.shape or self.dense.ndim != 1 or not len(self.dense):
            raise ValueError(f"{self.task}: one mark per item and model, not {self.dense.shape}, {self.thinned.shape}")

    @property
    def exact(self) -> bool:
        """Whether all marks are 0 or 1 and each item stands alone, so that exact tests of counts apply."""
        marks = np.concatenate([self.dense, self.thinned])
        return not self.groups and bool(np.isin(marks, (0, 1)).all())

    def units(self, values: Array) -> tuple[Array, Array]:
        """Sums of `values` [items] and numbers of items over what stands alone: items, or groups of them. [units]."""
        if not self.groups:
            return values, np.ones(len(values))
        place = np.unique(np.asarray(self.groups), return_inverse=True)[1]
        return np.bincount(place, values).astype(np.float64), np.bincount(place).astype(np.float64)

    @property
    def gain(self) -> Array:
        """Per item, how much better the thinned model is: positive is better, whatever the metric, [items]."""
        return self.thinned - self.dense if self.higher else self.dense - self.thinned


def paired(task: Task, dense: Marks, thinned: Marks, seed: int = 0) -> Outcome:
    """The outcome of a task from each model's marks. Raises ValueError where the models met other items."""
    if dense.keys != thinned.keys or dense.groups != thinned.groups:
        raise ValueError(f"{task.name}: the two models were not given the same items")
    return Outcome(
        task=task.name, capability=task.capability, metric=task.metric, higher=task.higher, chance=dense.chance,
        dense=dense.values, thinned=thinned.values, seed=seed, how=dense.how, keys=dense.keys, groups=dense.groups,
    )  # fmt: skip


_TASKS: dict[str, Task] = {}
_FAMILIES: dict[str, Callable[[str], Task]] = {}


def task(name: str, *, capability: str, of: Of | tuple[Of, ...], **card: Any) -> Callable[..., Any]:
    """Enter a task into the table; the first line of the function's docstring is its summary. `card`: see `Task`."""

    def enter(score: Callable[[Subject], Marks]) -> Callable[[Subject], Marks]:
        kinds = (of,) if isinstance(of, str) else tuple(of)
        summary = (score.__doc__ or "").strip().split("\n")[0]
        made = Task(name=name, capability=capability, of=kinds, score=score, **{"summary": summary, **card})
        there = _TASKS.get(name)
        if there is not None and there.score.__qualname__ != score.__qualname__:
            raise ValueError(f"task {name} is registered twice")
        _TASKS[name] = made
        return score

    return enter


def family(prefix: str) -> Callable[..., Any]:
    """Enter a function that makes the task `PREFIX:NAME` from NAME, for tasks that another library holds.

    It raises InputError for a name it doesn't know and UnsupportedError, one line, where its library is missing.
    """

    def enter(make: Callable[[str], Task]) -> Callable[[str], Task]:
        _FAMILIES[prefix] = make
        return make

    return enter


@cache
def _discover() -> None:
    """Import the modules of this package that hold tasks, then plug-ins (entry points `lamina.tasks`)."""
    package = importlib.import_module("lamina.evaluators.tasks")
    for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if not found.name.rsplit(".", 1)[-1].startswith("_"):
            importlib.import_module(found.name)
    from importlib.metadata import entry_points

    for entry in entry_points(group="lamina.tasks"):
        entry.load()


def tasks() -> Mapping[str, Task]:
    """All tasks by name, in the order of capability and name."""
    _discover()
    return dict(sorted(_TASKS.items(), key=lambda pair: (pair[1].capability, pair[0])))


def families() -> tuple[str, ...]:
    """The prefixes of tasks that other libraries hold."""
    _discover()
    return tuple(sorted(_FAMILIES))


def kind_of(model: nn.Module) -> Of:
    """Which kind of model this is, by its main input and whether it predicts tokens."""
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values":
        return "vision"
    if main in ("input_features", "input_values"):
        return "speech"
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "encoder-decoder"
    can = getattr(model, "can_generate", None)
    return "decoder" if not callable(can) or can() else "encoder"


def chosen(names: str, kind: Of | None = None) -> tuple[Task, ...]:
    """The tasks of `offline`, of names between commas, or of both; each once, and for models of `kind`.

    A group gives those of its tasks that fit. Raises InputError for an unknown name and UnsupportedError for a task
    that was named and is of another kind of model.
    """
    known, found = tasks(), dict[str, Task]()
    groups = {g for t in known.values() for g in t.groups}
    for name in (n.strip() for n in names.split(",") if n.strip()):
        prefix, _, rest = name.partition(":")
        if name in groups:
            found |= {n: t for n, t in known.items() if name in t.groups and (kind is None or kind in t.of)}
            continue
        if rest and prefix in _FAMILIES:
            one = _FAMILIES[prefix](rest)
        elif name in known:
            one = known[name]
        else:
            near = [*known, *sorted(groups), *(f"{p}:" for p in families())]
            raise InputError(f"no task named {name!r}", hint=did_you_mean(name, near))
        if kind is not None and kind not in one.of:
            raise UnsupportedError(f"the task {name} is for {' and '.join(one.of)} models, and this is a {kind}")
        found[one.name] = one
    if not found:
        raise InputError(f"no task of {names!r} is for a {kind} model", hint="lamina tasks lists them")
    return tuple(found.values())
