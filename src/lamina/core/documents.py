"""The three documents and the evidence: recipe (intent), plan (decision), receipts (fact).

Each is a frozen dataclass that goes to YAML or JSON and back; unknown keys are refused with a hint.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

from lamina.core.errors import InputError, did_you_mean
from lamina.core.files import read_data, to_json, to_yaml, write_text
from lamina.core.sites import Cost

FORMAT = 1


def plain(value: Any) -> Any:
    """Dataclasses, enums, tuples and mappings as plain data; fields at their default are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        rows: dict[str, Any] = {}
        for f in dataclasses.fields(value):
            item = getattr(value, f.name)
            default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
            if item != default or f.metadata.get("always"):
                rows[f.name] = plain(item)
        return rows
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}  # type: ignore[reportUnknownArgumentType]
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]  # type: ignore[reportUnknownVariableType]
    if isinstance(value, Path):
        return str(value)
    return value


class Document:
    """Reading and writing, shared by all documents."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    @classmethod
    def from_data(cls, data: Any, *, where: object = "") -> Self:
        """Check plain data against the class; one line says which key is wrong."""
        from pydantic import TypeAdapter, ValidationError

        name = cls.__name__.lower()
        if not isinstance(data, Mapping):
            raise InputError(f"a {name} is a mapping of keys, not {type(data).__name__}", where=where)
        given = cast("Mapping[str, Any]", data).get("lamina", FORMAT)
        if given != FORMAT:
            hint = (
                "a newer lamina may read it" if isinstance(given, int) and given > FORMAT else f"write lamina: {FORMAT}"
            )
            raise InputError(f"this {name} has format lamina: {given}, not {FORMAT}", where=where, hint=hint)
        try:
            return TypeAdapter(cls).validate_python(data)
        except ValidationError as error:
            first = error.errors()[0]
            at = ".".join(str(p) for p in first["loc"]) or name
            if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
                known = _keys_at(cls, first["loc"][:-1])
                hint = did_you_mean(str(first["loc"][-1]), known)
                raise InputError(f"unknown key {at!r} in the {name}", where=where, hint=hint) from None
            message = first["msg"].removeprefix("Value error, ")
            raise InputError(f"{name}: {at}: {message}", where=where) from None

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a YAML or JSON file."""
        return cls.from_data(read_data(Path(path)), where=path)

    def to_data(self) -> dict[str, Any]:
        """Plain data; what stands at its default is left out."""
        return plain(self)

    def save(self, path: Path | str) -> None:
        """Write YAML or JSON (by suffix), atomically."""
        path = Path(path)
        data = self.to_data()
        write_text(path, to_json(data) if path.suffix == ".json" else to_yaml(data))


def _keys_at(cls: type, loc: tuple[int | str, ...]) -> list[str]:
    """The field names of the dataclass that stands at `loc` inside `cls`."""
    import typing

    here: Any = cls
    for part in loc:
        if isinstance(part, int):
            continue
        hint = typing.get_type_hints(here).get(str(part)) if dataclasses.is_dataclass(here) else None
        options = [a for a in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(a)]
        if not options:
            return []
        here = options[0]
    return [f.name for f in dataclasses.fields(here)]


Metric = Literal["parameters", "bytes", "macs", "kv_bytes", "latency", "blocks", "sublayers"]
COUNTED = ("blocks", "sublayers")
WORK = re.compile(r"(prefill|decode)(:[1-9]\d*x[1-9]\d*)?")
"""What latency is of: `decode:4x512` is a token for each of 4 sequences behind 512 others."""


@dataclass(frozen=True, kw_only=True)
class Limit(Document):
    """How much of one resource may stay: `keep`, a share of the dense model's, or `limit`, an amount.

    Amounts are parameters, bytes of weights, multiply-adds per token, KV bytes and seconds. `at`: the context in tokens
    that KV bytes are of, and the work that latency is of (`decode`, `prefill:1x512`: batch × tokens).
    """

    metric: Metric = field(default="parameters", metadata={"always": True})
    keep: float | None = None
    limit: int | float | None = None
    at: str = ""

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.limit is None):
            raise ValueError("a limit takes exactly one of keep and limit")
        self._check()

    def _check(self) -> None:
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"keep must lie in (0, 1], not {self.keep}")
        if self.limit is not None and not 0 < self.limit < float("inf"):
            raise ValueError(f"limit must be positive, not {self.limit}")
        if self.limit is not None and self.metric in COUNTED:
            raise ValueError(f"{self.metric} take keep or drop, not limit")
        if self.metric == "latency" and not WORK.fullmatch(self.at):
            raise ValueError(f"latency is of prefill or decode, as decode:1x512, not of {self.at!r}")
        if self.metric == "kv_bytes" and self.at and not (self.at.isdigit() and int(self.at)):
            raise ValueError(f"KV bytes are at a number of tokens, not at {self.at!r}")
        if self.metric == "kv_bytes" and self.limit is not None and not self.at:
            raise ValueError("an amount of KV bytes is at a number of tokens")
        if self.at and self.metric not in ("kv_bytes", "latency"):
            raise ValueError(f"{self.metric} are the same at all lengths, not at {self.at!r}")

    @property
    def resource(self) -> str:
        """What is limited, by one word: the metric, of latency with its work."""
        if self.metric != "latency":
            return self.metric
        return f"latency@{self.at if ':' in self.at else self.at + ':1x512'}"

    def need(self, whole: float) -> float:
        """How much must go, where the dense model takes `whole` (of KV bytes: per token)."""
        if self.keep is not None:
            exact = whole * (1 - self.keep)
            return exact if self.metric == "latency" else int(exact + 0.999999)
        assert self.limit is not None
        return max(whole - self.limit / (int(self.at) if self.metric == "kv_bytes" else 1), 0)


@dataclass(frozen=True, kw_only=True)
class Budget(Limit):
    """How much may stay: exactly one of `keep` (a fraction of the dense model's), `limit` (an absolute
    number: parameters, bytes, …) and `drop` (a number of blocks or sublayers to take out).

    `also` are limits of other resources, which hold at once. `protect` lists sites that must stay.
    """

    drop: int | None = None
    also: tuple[Limit, ...] = ()
    protect: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = [n for n in ("keep", "limit", "drop") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"a budget takes exactly one of keep, limit and drop, not {given or 'none'}")
        self._check()
        if self.drop is not None and self.drop < 0:
            raise ValueError(f"drop must not be negative, not {self.drop}")
        if self.drop is not None and self.metric not in COUNTED:
            raise ValueError(f"drop counts blocks or sublayers, not {self.metric}")
        names = [r.resource for r in self.limits]
        if len(set(names)) < len(names):
            raise ValueError(f"one limit for each resource, not two of {next(n for n in names if names.count(n) > 1)}")

    @property
    def limits(self) -> tuple[Limit, ...]:
        """All that must hold."""
        return (self, *self.also)


@dataclass(frozen=True, kw_only=True)
class Heal(Document):
    """What to do after the rewrite: a healer, by a budget of steps or minutes."""

    healer: str = field(default="lora", metadata={"always": True})
    steps: int | None = None
    minutes: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("healing takes exactly one of steps and minutes")
        amount = self.steps if self.steps is not None else self.minutes
        if not (amount is not None and 0 < amount < float("inf")):
            raise ValueError(f"healing takes a positive number of steps or minutes, not {amount}")


@dataclass(frozen=True, kw_only=True)
class Data(Document):
    """The text: `default` is the prose that lamina ships; else files, folders, JSONL, Parquet or `hf:NAME`."""

    calibration: str = "default"
    heldout: str = "default"
    column: str = "text"
    length: int = 512
    sequences: int = 32
    heldout_sequences: int = 32


@dataclass(frozen=True, kw_only=True)
class Recipe(Document):
    """Intent, for any model: what to measure, how to choose, what to do, within which budget."""

    lamina: int = field(default=FORMAT, metadata={"always": True})
    name: str = field(default="default", metadata={"always": True})
    model: str = field(default="", metadata={"always": True})
    budget: Budget
    heal: Heal | None = None
    data: Data = field(default_factory=Data)
    measure_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    planner_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    refit: bool | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "cpu"
    seed: int = 0
    trust_remote_code: bool = False
    gguf: bool = False


@dataclass(frozen=True, kw_only=True)
class Step(Document):
    """One decision: a rewrite of explicit sites, and why."""

    rewrite: str
    sites: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    why: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, kw_only=True)
class ModelRef(Document):
    """The model a plan was made for."""

    name: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Plan(Document):
    """Decision, for one model revision: explicit sites, never a fraction."""

    lamina: int = field(default=FORMAT, metadata={"always": True})
    model: ModelRef
    recipe: str = field(default="default", metadata={"always": True})
    budget: Budget
    steps: tuple[Step, ...] = field(metadata={"always": True})
    expects: Mapping[str, float] = field(default_factory=dict[str, float])

    def sites(self) -> tuple[str, ...]:
        """All sites of all steps, in the plan's order."""
        return tuple(site for step in self.steps for site in step.sites)


@dataclass(frozen=True, kw_only=True)
class Receipt(Document):
    """Fact: what one step did, with all that is needed to rebuild the structure on an empty skeleton.

    `structure` is plain data that `lamina.rewrites.structure.replay` understands without lamina.
    """

    rewrite: str
    sites: tuple[str, ...]
    before: Cost = field(metadata={"always": True})
    after: Cost = field(metadata={"always": True})
    structure: Mapping[str, Any] = field(default_factory=dict[str, Any])
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class Receipts(Document):
    """`receipts.json`: what was done to which model, in order, and by which healer."""

    lamina: int = field(default=FORMAT, metadata={"always": True})
    model: ModelRef
    plan: str
    receipts: tuple[Receipt, ...] = field(metadata={"always": True})
    healed: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class Evidence(Document):
    """One measured number with its interval, n and seed.

    `low` and `high` bound the 95 % interval where there is one. `of` says whose number it is: `dense`,
    `thinned`, or `difference`/`ratio` of the two.

    Of tasks (`task:NAME`) and capabilities (`capability:NAME`) also: which way is `better`, what guessing gives
    (`chance`), the p value of the difference corrected for the number of tests (`p`), and the smallest loss that would
    have been found in four runs of five (`sees`, as a positive number in the value's unit).
    """

    name: str
    value: float = field(metadata={"always": True})
    unit: str = ""
    of: Literal["dense", "thinned", "difference", "ratio", "contract"] = "thinned"
    low: float | None = None
    high: float | None = None
    n: int = 0
    seed: int = 0
    how: str = ""
    capability: str = ""
    better: Literal["", "higher", "lower"] = ""
    chance: float | None = None
    p: float | None = None
    sees: float | None = None


@dataclass(frozen=True, kw_only=True)
class EvidenceFile(Document):
    """`evidence.json`: every number that `prove` measured."""

    lamina: int = field(default=FORMAT, metadata={"always": True})
    evidence: tuple[Evidence, ...] = field(metadata={"always": True})
    notes: tuple[str, ...] = ()

    def get(self, name: str, of: str = "thinned") -> Evidence | None:
        """The evidence of that name, or None."""
        return next((e for e in self.evidence if e.name == name and e.of == of), None)
