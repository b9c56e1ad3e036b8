"""What the checks work on: tiny labs that cost milliseconds, synthetic scores, and pictures of a model's state."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lamina.anatomy import Anatomy
from lamina.core.scores import Array, Scores
from lamina.core.sites import Kind
from lamina.lab import Lab
from lamina.testing.models import own_text, text, tiny
from lamina.testing.planted import silence
from lamina.testing.suite import expect


@cache
def _original(name: str, silent: tuple[str, ...], dtype: torch.dtype) -> tuple[nn.Module, Anatomy, Tensor]:
    model = tiny(name).to(dtype)
    anatomy = Anatomy.of(model)
    silence(anatomy, *silent)
    return model, anatomy, own_text(model, 24 if silent else 8)


def fresh(name: str, *silent: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Anatomy, Tensor]:
    """A tiny model of one's own, its anatomy, and a text [8, 16] drawn from it.

    `silent` sites add nothing; the text is longer then, so that the losses tell all other sites from these.
    """
    original, anatomy, ids = _original(name, silent, dtype)
    model = copy.deepcopy(original)
    mine = copy.copy(anatomy)
    mine.model = model
    return model, mine, ids


def lab(name: str = "llama", *silent: str, batch_size: int = 8, dtype: torch.dtype = torch.float32) -> Lab:
    """A lab on a tiny model and a text that the model itself wrote."""
    model, anatomy, ids = fresh(name, *silent, dtype=dtype)
    return Lab(model, ids, anatomy=anatomy, batch_size=batch_size)


def lab_on(batches: Tensor | Sequence[Any], name: str = "llama", **options: Any) -> Lab:
    """A lab on a tiny model and these batches."""
    model, anatomy, _ = fresh(name)
    return Lab(model, batches, anatomy=anatomy, **options)


def rows(lengths: Sequence[int] = (16, 9, 12, 5, 14, 7)) -> list[Tensor]:
    """Sequences of these lengths: beginnings of the tiny llama's own text."""
    ids = fresh("llama")[2]
    return [ids[i, :n] for i, n in enumerate(lengths)]


def synthetic(anatomy: Anatomy, seed: int = 0, *, constant: bool = False) -> Scores:
    """Made-up scores in (0, 1] of all sites and of all runs of blocks; all the same if `constant`."""
    draw = np.random.default_rng(seed)

    def some(count: int) -> Array:
        return np.ones(count) if constant else 1.0 - draw.random(count)

    values = {s.id: some(s.width) for s in anatomy.sites}
    spans = {b.site.id: some(len(k.blocks) - n) for k in anatomy.stacks for n, b in enumerate(k.blocks)}
    return Scores(
        measure="synthetic", values=values, stderr={k: v * 0.1 for k, v in values.items()}, unit="nats", spans=spans
    )


class SyntheticMeasure:
    """Stands for the measure in use where a planner scores anew."""

    def __init__(self, *, constant: bool = False) -> None:
        self.constant = constant

    def measure(self, lab: Lab) -> Scores:
        """Made-up scores of the lab's model."""
        return synthetic(lab.anatomy, constant=self.constant)


HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def picture(model: nn.Module) -> dict[str, Any]:
    """All that a method must leave as it was: weights, gradients, hooks, modes, attributes, config, random state."""
    seen: dict[str, Any] = {f"weights {k}": v.clone() for k, v in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        seen[f"requires_grad {name}"] = parameter.requires_grad
        seen[f"grad {name}"] = parameter.grad is not None
        seen[f"attributes of parameter {name}"] = sorted(parameter.__dict__)
    for name, module in model.named_modules():
        seen[f"class of {name!r}"] = type(module).__qualname__
        seen[f"mode of {name!r}"] = module.training
        seen[f"attributes of {name!r}"] = sorted(vars(module))
        for kind in HOOKS:
            seen[f"{kind} of {name!r}"] = len(getattr(module, kind, ()) or ())
    made = getattr(model, "config", None)
    seen["config"] = made.to_dict() if made is not None else {}
    seen["torch's random state"] = torch.get_rng_state()
    seen["numpy's random state"] = repr(np.random.get_state())
    seen["gradients on"] = torch.is_grad_enabled()
    seen["default type"] = torch.get_default_dtype()
    return seen


def expect_same(before: dict[str, Any], after: dict[str, Any], who: str) -> None:
    """Raise AssertionError that names what changed."""
    changed = [k for k in before if k not in after] + [k for k in after if k not in before]
    for key in before.keys() & after.keys():
        a, b = before[key], after[key]
        same = torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        changed += [] if same else [key]
    expect(not changed, f"{who} leaves something behind or changed: {', '.join(sorted(changed)[:5])}")


def expect_close(got: Scores, want: Scores, relative: float, what: str) -> None:
    """Raise AssertionError unless both tables agree within `relative` of the largest score (values and runs)."""
    expect(set(got.values) == set(want.values), f"{what}: the scored sites differ")
    for mine, yours in ((got.values, want.values), (got.spans, want.spans)):
        scale = max((float(np.abs(v).max()) for v in yours.values()), default=0.0)
        for site, value in yours.items():
            off = float(np.abs(mine[site] - value).max())
            expect(
                off <= relative * scale,
                f"{what}: {site} is {mine[site]}, not {value} ({off / (scale or 1):.1e} of the scale)",
            )


def mixed(kinds: Sequence[Kind], *wanted: Kind) -> bool:
    """Whether a method on `kinds` (none: all) takes any of the wanted kinds."""
    return not kinds or bool(set(kinds) & set(wanted))


__all__ = ["expect_close", "expect_same", "fresh", "lab", "lab_on", "mixed", "picture", "rows", "synthetic", "text"]
