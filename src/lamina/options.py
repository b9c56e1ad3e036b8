"""What the command line's words mean: shares, amounts, budgets, recipes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.core.errors import InputError

if TYPE_CHECKING:
    from lamina.core.documents import Budget, Recipe
    from lamina.pipeline import Run


def share(text: str, option: str = "--keep") -> float:
    """`75%` or `0.75` as a fraction."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise InputError(f"{text!r} is no share", where=option, hint="write 75% or 0.75") from None
    if not 0 < value <= 1:
        raise InputError(f"{text} is not above 0 and at most 100%", where=option, hint="write 75% or 0.75")
    return value


UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "b": 10**9,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}


def amount(text: str, option: str) -> int:
    """`100M`, `1.5B`, `200MB` as a whole number."""
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    unit = text.strip()[len(number) :].lower()
    try:
        value = int(float(number) * UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise InputError(f"{text!r} is no amount", where=option, hint="write 100M, 1.5B or 200MB") from None
    if value <= 0:
        raise InputError(f"{text} is not positive", where=option)
    return value


def most(text: str, option: str) -> dict[str, Any]:
    """`100M` or `200MB` as a limit, `50%` or `0.5x` as a share to keep."""
    text = text.strip()
    if text.endswith(("%", "x")):
        return {"keep": share(text.removesuffix("x"), option)}
    return {"limit": amount(text, option)}


def kv(text: str) -> dict[str, Any]:
    """`0.5x`, `50%@32k` or `100MB@8192`: the KV bytes that may stay, at a context in tokens."""
    size, _, at = text.partition("@")
    if not at and not size.strip().endswith(("%", "x")):
        raise InputError(f"{text} at which context?", where="--kv", hint="write 100MB@32k")
    tokens = str(amount(at[:-1] + "kib" if at[-1:] in "kK" else at, "--kv")) if at else ""
    return {"metric": "kv_bytes", **most(size, "--kv"), "at": tokens}


def latency(text: str) -> dict[str, Any]:
    """`0.7x@decode`, `70%@prefill:4x512` or `20ms@decode`: the time that may be taken, and for which work."""
    from lamina.core.documents import WORK

    much, _, work = text.partition("@")
    if not WORK.fullmatch(work):
        what = f"{work!r} is no work" if work else f"{text} of which work?"
        raise InputError(what, where="--latency", hint="write 0.7x@decode, or 0.7x@prefill:4x512 (batch x tokens)")
    if much.strip().endswith(("%", "x")):
        return {"metric": "latency", **most(much, "--latency"), "at": work}
    number = much.strip().removesuffix("ms") if much.strip().endswith("ms") else ""
    try:
        seconds = float(number) / 1000
    except ValueError:
        raise InputError(f"{much!r} is no time", where="--latency", hint="write 0.7x, 70% or 20ms") from None
    return {"metric": "latency", "limit": seconds, "at": work}


def budget_of(words: Mapping[str, Any]) -> Budget | None:
    """The budget that was asked for by the options keep, parameters, bytes_, kv, latency, blocks, sublayers and
    protect; None where none was. Resources may be mixed; blocks and sublayers go alone.
    """
    from lamina.core.documents import Budget

    asked = {name.rstrip("_"): value for name, value in words.items()}
    protect = asked.get("protect")
    means: dict[str, Callable[[Any], dict[str, Any]]] = {
        "keep": lambda x: {"keep": share(x)},
        "parameters": lambda x: most(x, "--parameters"),
        "bytes": lambda x: {"metric": "bytes", **most(x, "--bytes")},
        "kv": kv,
        "latency": latency,
        "blocks": lambda x: {"metric": "blocks", "drop": x},
        "sublayers": lambda x: {"metric": "sublayers", "drop": x},
    }
    given = [name for name in means if asked.get(name) is not None]
    alone = next((n for n in (("blocks", "sublayers"), ("keep", "parameters")) if len({*n} & {*given}) > 1), None)
    counted = next((n for n in given if n in ("blocks", "sublayers")), None)
    if alone is not None or (counted and len(given) > 1):
        raise InputError(f"one budget at a time, not {' and '.join('--' + n for n in given)}")
    if not given and protect:
        raise InputError("--protect belongs to a budget", hint="say --keep 75% --protect block.0")
    if not given:
        return None
    first, *more = (means[name](asked[name]) for name in given)
    return Budget.from_data({**first, "also": more, "protect": tuple(protect or ())}, where=f"--{given[0]}")


def recipe_of(name: str) -> tuple[str, dict[str, Any]]:
    """The name of a recipe row, and what a recipe file says beside it."""
    from lamina.core import registry
    from lamina.core.documents import Recipe

    if Path(name).suffix in (".yaml", ".yml", ".json"):
        data = Recipe.load(name).to_data()
        registry.row(data["name"])
        return data["name"], data
    registry.row(name)
    return name, {}


def make_recipe(data: dict[str, Any]) -> Recipe:
    """A recipe from what the command line says."""
    from lamina.core.documents import Recipe

    return Recipe.from_data({k: v for k, v in data.items() if v is not None})


def laid_over(
    data: dict[str, Any], asked: dict[str, Any], texts: dict[str, Any], typed: Callable[[str], bool]
) -> dict[str, Any]:
    """A recipe file's data with what was typed laid over it; without a file, all that was asked, defaults too."""
    told = {k: v for k, v in {**asked, **texts}.items() if not data or typed(k)}
    spoken = {("calibration" if k == "text" else k): told[k] for k in texts if k in told}
    return {**data, **{k: told[k] for k in asked if k in told}, "data": {**data.get("data", {}), **spoken}}


def begin(recipe: Recipe, out: Path | None) -> Run:
    """Start or take up a run; by default in a folder named after the model and the recipe."""
    from lamina.pipeline import Run

    stem = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(recipe.model).name or recipe.model)
    return Run.start(out or Path(f"{stem}-{recipe.name}"), recipe)


def opened(folder: Path) -> Run:
    """An existing run."""
    from lamina.pipeline import Run

    return Run.open(folder)
