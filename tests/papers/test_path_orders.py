"""The expansion into paths (arXiv 2510.03470): all subsets of blocks by hand, and finite differences."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lamina.core.errors import InputError
from lamina.core.registry import MEASURES
from lamina.core.scores import Scores
from lamina.lab import Lab
from lamina.papers.depth.path_orders import expanded
from lamina.testing.models import padded, text, tiny
from lamina.testing.planted import silence


def measured(lab: Lab, **options: Any) -> Scores:
    return MEASURES.make("path-orders", options).measure(lab)


def chain(maps: list[Any], x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The streams of a residual net, each in the graph of the one before."""
    steps = []
    for f in maps:
        x = x.detach().requires_grad_()
        steps.append((x, x + f(x)))
        x = steps[-1][1]
    return steps


def test_a_linear_net_is_the_sum_over_all_subsets_of_its_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(5, 5, generator=generator, dtype=torch.float64) / 3 for _ in range(4)]
    x = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    steps = chain([lambda v, w=w: v @ w for w in matrices], x)
    orders, through, updates = expanded(steps)
    assert len(orders) == 5
    for k in range(5):
        total = torch.zeros_like(x)
        for chosen in itertools.combinations(range(4), k):
            path = x
            for block in chosen:
                path = path @ matrices[block]
            total = total + path
        torch.testing.assert_close(orders[k], total)
    torch.testing.assert_close(torch.stack(orders).sum(0), steps[-1][1].detach())
    for block in range(4):
        without = x
        for n, w in enumerate(matrices):
            without = without if n == block else without + without @ w
        torch.testing.assert_close(through[block], steps[-1][1].detach() - without)
        torch.testing.assert_close(updates[block], steps[block][0].detach() @ matrices[block])


def test_equal_scalars_give_binomial_numbers() -> None:
    x = torch.tensor([[[2.0]]], dtype=torch.float64)
    orders, _, _ = expanded(chain([lambda v: 0.3 * v] * 6, x))
    assert [float(p) for p in orders] == pytest.approx([2 * math.comb(6, k) * 0.3**k for k in range(7)])


def test_orders_add_up_to_the_stream_of_any_net() -> None:
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = chain([torch.tanh, lambda v: v.square() + 1, lambda v: torch.zeros_like(v) + 3 + 0 * v], x)
    orders, through, _ = expanded(steps)
    torch.testing.assert_close(torch.stack(orders).sum(0), steps[-1][1].detach())
    torch.testing.assert_close(through[-1], torch.full_like(x, 3.0))


def streams(model: Any, ids: Tensor, change: tuple[int, Any] | None = None) -> list[Tensor]:
    """What a llama's layers return, before them the embeddings; one layer's input or output changed."""
    found: list[Tensor] = []
    handles = []
    for n, layer in enumerate(model.model.layers):

        def note(_: Any, args: Any, out: Tensor, n: int = n) -> Tensor:
            found.extend([args[0]] if n == 0 else [])
            out = change[1](args[0], out) if change is not None and change[0] == n else out
            found.append(out)
            return out

        handles.append(layer.register_forward_hook(note))
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def test_paths_through_a_block_are_what_a_little_of_it_changes() -> None:
    """By central differences: the last stream with a block's update scaled by 1 ± h."""
    model, ids, h = tiny("llama").double(), text(2, 8), 3e-3
    got = measured(Lab(model, ids))
    last = streams(model, ids)[-1]
    for n in range(4):
        up, down = (streams(model, ids, (n, lambda x, y, s=s: x + (1 + s * h) * (y - x)))[-1] for s in (1, -1))
        change = (up - down) / (2 * h)
        wanted = float((change.norm(dim=-1) / last.norm(dim=-1)).mean())
        assert got[f"block.{n}"] == pytest.approx(wanted, rel=1e-3)


def test_updates_are_jacobians_along_the_stream() -> None:
    model, ids, h = tiny("gemma2").double(), text(2, 8), 3e-3
    got = measured(Lab(model, ids), score="update")
    for n in range(4):
        x = streams(model, ids)[n]
        ways = []
        for scale in (1 + h, 1 - h):
            layer: Any = model.get_submodule(f"model.layers.{n}")
            handle = layer.register_forward_pre_hook(lambda _, a, s=scale: (a[0] * s, *a[1:]))
            found = streams(model, ids)
            ways.append(found[n + 1] - (found[n] if n == 0 else x * scale))
            handle.remove()
        along = (ways[0] - ways[1]) / (2 * h)
        assert got[f"block.{n}"] == pytest.approx(float((along.norm(dim=-1) / x.norm(dim=-1)).mean()), rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mixtral", "nanogpt"])
def test_grids_hold_the_orders(name: str) -> None:
    got = measured(Lab(tiny(name), text(2, 8)))
    orders = got.grids["orders"]
    assert orders.rows == ("0", "1", "2", "3", "4")
    assert orders.values[:, 1].sum() == pytest.approx(1.0)
    length = got.grids["length"].values[0, 0]
    assert length == pytest.approx((orders.values[:, 1] * range(5)).sum())
    assert 0 < length < 4
    blocks = got.grids["blocks"]
    assert blocks.columns == ("paths", "update")
    assert [got[b] for b in blocks.rows] == pytest.approx(list(blocks.values[:, 0]))


def test_an_identity_block_has_no_paths() -> None:
    lab = Lab(tiny("llama"), text(2, 8))
    silence(lab.anatomy, "block.1")
    for score in ("paths", "update"):
        got = measured(lab, score=score)
        assert got["block.1"] == 0.0
        assert got["block.2"] > 0.0


def test_means_are_over_tokens_and_errors_over_sequences() -> None:
    model = tiny("llama")
    rows = [text(1, n, seed=n)[0] for n in (4, 11, 7)]
    each = [measured(Lab(model, r.unsqueeze(0)))["block.1"] for r in rows]
    got = measured(Lab(model, padded(rows, 3, side="left")))
    assert got["block.1"] == pytest.approx(sum(e * n for e, n in zip(each, (4, 11, 7), strict=True)) / 22, rel=1e-4)
    assert got.stderr["block.1"][0] > 0


def test_wrong_options_are_refused() -> None:
    for options, line in (({"score": "sum"}, "score is one of paths, update"), ({"length": 0}, "length is at least 1")):
        with pytest.raises(InputError, match=line):
            MEASURES.make("path-orders", options)
