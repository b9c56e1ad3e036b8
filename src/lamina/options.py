"""What the command line's words mean: shares, amounts, budgets, recipes."""

from __future__ import annotations

from collections.abc import Callable
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
    """`100M` or `200MB` as a limit, `50%` as a share to keep."""
    return {"keep": share(text, option)} if text.strip().endswith("%") else {"limit": amount(text, option)}


def budget_of(
    keep: str | None,
    parameters: str | None,
    bytes_: str | None,
    blocks: int | None,
    sublayers: int | None,
    protect: list[str] | None,
) -> Budget | None:
    """The one budget that was asked for; None where none was."""
    from lamina.core.documents import Budget

    asked: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    if keep is not None:
        asked.append(("--keep", lambda: {"keep": share(keep)}))
    if parameters is not None:
        asked.append(("--parameters", lambda: most(parameters, "--parameters")))
    if bytes_ is not None:
        asked.append(("--bytes", lambda: {"metric": "bytes", **most(bytes_, "--bytes")}))
    if blocks is not None:
        asked.append(("--blocks", lambda: {"metric": "blocks", "drop": blocks}))
    if sublayers is not None:
        asked.append(("--sublayers", lambda: {"metric": "sublayers", "drop": sublayers}))
    if len(asked) > 1:
        raise InputError(f"one budget at a time, not {' and '.join(name for name, _ in asked)}")
    if not asked and protect:
        raise InputError("--protect belongs to a budget", hint="say --keep 75% --protect block.0")
    if not asked:
        return None
    return Budget.from_data({**asked[0][1](), "protect": tuple(protect or ())}, where=asked[0][0])


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
