"""Whether a model's own class builds the narrower shapes from its config, so that a plain checkpoint will do."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lamina.core.sites import Kind

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lamina.anatomy import Anatomy
    from lamina.core.sites import Site

Widths = Sequence[tuple[int, int]]
"""Numbers that may stand in a config: before and after."""


def widths_of(anatomy: Anatomy, sites: Sequence[Site], gone: Mapping[str, Sequence[int]]) -> list[tuple[int, int]]:
    """What a config may count: units, and the heads that KV groups hold; nothing where sites of a kind differ."""
    found: set[tuple[int, int]] = set()
    for kind in {s.kind for s in sites}:
        mine = [s for s in sites if s.kind is kind]
        left = {s.width - len(set(gone.get(s.id, ()))) for s in (*mine, *anatomy.of_kind(kind))}
        if len(left) > 1 or len({s.width for s in mine}) > 1:
            return []
        inner = 1 if kind is Kind.CHANNEL else anatomy.grouped(mine[0])[1]
        found |= {(mine[0].width * number, min(left) * number) for number in (1, inner)}
    return sorted(found)


def said_by_config(anatomy: Anatomy, widths: Widths, steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The step that lets the config tell the widths, where the class then builds all these shapes; or nothing.

    Fields that held a width before get what it is after, one by one, as long as more of the shapes come out right.
    Modules get the whole numbers that the class would give them.
    """
    from lamina.anatomy.config import config_of
    from lamina.anatomy.counting import twin
    from lamina.rewrites.structure import replay

    config, cut = config_of(anatomy.model), twin(anatomy.model)
    if not widths or cut is None or config is None or config is not getattr(anatomy.model, "config", None):
        return {}
    replay(cut, steps)
    fields = _fields(config, widths, anatomy.model)
    chosen: dict[str, tuple[int | None, int]] = {}
    wrong, built = _wrong(anatomy.model, config, chosen, cut)
    while wrong > (0, 0):
        tried = [{**chosen, n: p} for n, p in fields if n not in chosen]
        ways = [(*_wrong(anatomy.model, config, way, cut), way) for way in tried]
        best = min(ways, key=lambda w: w[0], default=None)
        if best is None or best[0] >= wrong:
            break
        wrong, built, chosen = best
    if wrong[0] or not chosen:
        return {}
    return {"format": 1, "kind": "narrow", "cuts": {}, "numbers": _odd(built, cut), "config": chosen}


def _fields(config: Any, widths: Widths, model: nn.Module) -> list[tuple[str, tuple[int | None, int]]]:
    """Fields with their number and what it may become; one that says nothing may tell what modules hold by its name."""
    found: list[tuple[str, tuple[int | None, int]]] = []
    for name, value in config.to_dict().items():
        if type(value) is int:
            found += [(name, (value, after)) for before, after in widths if value == before]
        elif value is None:
            held = {vars(m)[name] for m in model.modules() if type(vars(m).get(name)) is int}
            found += [(name, (None, held.pop()))] if len(held) == 1 else []
    return found


def _wrong(
    model: nn.Module, config: Any, chosen: Mapping[str, tuple[int | None, int]], cut: nn.Module
) -> tuple[tuple[int, int], Any]:
    """How many tensors have another shape in what the class builds from these numbers, and how many modules hold other
    whole numbers; and what it builds.
    """  # fmt: skip
    from lamina.anatomy.counting import shapes, twin

    tried = copy.deepcopy(config)
    for name, (_, after) in chosen.items():
        setattr(tried, name, after)
    built = twin(model, tried)
    if built is None:
        return (1 << 30, 0), None
    mine, wanted = shapes(built), shapes(cut)
    return (sum(mine.get(k) != wanted.get(k) for k in {**mine, **wanted}), len(_odd(built, cut))), built


def _odd(built: nn.Module, cut: nn.Module) -> dict[str, dict[str, int]]:
    """The whole numbers that modules of one have and those of the other lack."""
    found: dict[str, dict[str, int]] = {}
    others = dict(cut.named_modules())
    for path, module in built.named_modules():
        mine = {k: v for k, v in vars(module).items() if type(v) is int}
        odd = {k: v for k, v in mine.items() if path not in others or vars(others[path]).get(k) != v}
        found |= {path: odd} if odd else {}
    return found


def first_output(anatomy: Anatomy) -> Tensor | None:
    """What the model makes of the anatomy's sample."""
    import torch

    from lamina.anatomy.stacks import call, evaluating
    from lamina.anatomy.trace import first_tensor

    with torch.no_grad(), evaluating(anatomy.model):
        out: Any = call(anatomy.model, anatomy.sample)
    return first_tensor(list(out.values()) if isinstance(out, Mapping) else out)


def told(anatomy: Anatomy, said: Mapping[str, Any]) -> bool:
    """Let the config tell the widths; undone, and False, where the model then computes something else.

    So it is where a forward reads its config: embeddings times the root of the width.
    """
    import torch

    from lamina.rewrites.structure import replay

    before = first_output(anatomy)
    try:
        with undone_on_error(anatomy.model):
            replay(anatomy.model, [said])
            try:
                after = first_output(anatomy)
            except (RuntimeError, ValueError, IndexError) as error:
                raise _OtherwiseError from error
            if before is None or after is None or not torch.allclose(before, after, rtol=1e-3, atol=1e-4):
                raise _OtherwiseError
    except _OtherwiseError:
        return False
    return True


class _OtherwiseError(Exception):
    """The config changes what is computed."""


@contextmanager
def undone_on_error(model: nn.Module, paths: Iterable[str] = ()) -> Iterator[None]:
    """Inside, structure may change; if an error leaves, every module and the config are what they were.

    Of tensors that are changed in place, the weights of the modules `paths` are.
    """
    import torch

    weights: list[Any] = [model.get_submodule(p).weight for p in paths]
    kept = [w.detach().clone() for w in weights]
    config = getattr(model, "config", None)
    fields = dict(vars(config)) if config is not None else {}
    parts = ("_parameters", "_buffers", "_modules")
    held = [(m, dict(vars(m)), {p: dict(vars(m)[p]) for p in parts}) for m in model.modules()]
    try:
        yield
    except BaseException:
        for module, attributes, tables in held:
            vars(module).clear()
            vars(module).update(attributes)
            for part, table in tables.items():
                vars(module)[part].clear()
                vars(module)[part].update(table)
        if config is not None:
            vars(config).clear()
            vars(config).update(fields)
        with torch.no_grad():
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)
        raise
