"""Causal effects and Jacobians of layers (arXiv 2603.15389) against their definitions, token by token."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lamina.core.errors import InputError
from lamina.core.registry import MEASURES
from lamina.lab import Lab
from lamina.testing.models import own_text, padded, text, tiny
from lamina.testing.planted import silence


def updates(model: nn.Module, name: str, ids: Tensor, gone: list[str], literal: ModuleType) -> list[Tensor]:
    """What each block adds, float64 [tokens, width]."""
    with literal.masked(model, name, gone):
        pairs = literal.pairs(model, name, ids)
    return [(pairs[f"block.{n}"][1] - pairs[f"block.{n}"][0]).flatten(0, 1) for n in range(4)]


def sums(model: nn.Module, name: str, ids: Tensor, skipped: int, literal: ModuleType) -> list[tuple[float, float]]:
    """Σ ‖u_l - ū_l‖ and Σ ‖u_l‖ over tokens, for all later l."""
    clean = updates(model, name, ids, [], literal)
    moved = updates(model, name, ids, [f"block.{skipped}"], literal)
    return [
        (
            sum(float((u - v).norm()) for u, v in zip(clean[later], moved[later], strict=True)),
            sum(map(float, clean[later].norm(dim=1))),
        )
        for later in range(skipped + 1, 4)
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "mixtral"])
def test_causal_effect_is_the_papers_formula(name: str, literal: ModuleType) -> None:
    model, ids = tiny(name), text(3, 9)
    got = MEASURES.make("causal-effect").measure(Lab(model, ids, batch_size=2))
    for s in range(4):
        row = np.zeros(4)
        row[s + 1 :] = [a / b for a, b in sums(model, name, ids, s, literal)]
        assert got.grids["effects"].values[s] == pytest.approx(row, rel=2e-4)
        assert got[f"block.{s}"] == pytest.approx(row.mean(), rel=2e-4)
    assert got["block.3"] == 0.0


def test_an_identity_block_causes_nothing() -> None:
    lab = Lab(tiny("llama"), text(3, 9))
    silence(lab.anatomy, "block.1")
    got = MEASURES.make("causal-effect").measure(lab)
    assert got["block.1"] == 0.0
    assert got["block.0"] > 0 < got["block.2"]
    assert got.grids["effects"].values[0, 1] == 0.0, "an update of nothing can't move"


def test_causal_effects_are_ratios_of_means_and_their_errors_those_of_a_ratio(literal: ModuleType) -> None:
    model = tiny("llama")
    rows = [text(1, n, seed=n)[0] for n in (4, 11, 7, 9)]
    each = np.array([sums(model, "llama", r.unsqueeze(0), 1, literal) for r in rows])  # [sequences, later, 2]
    got = MEASURES.make("causal-effect").measure(Lab(model, padded(rows, 3)))
    total = each.sum(0)
    assert got["block.1"] == pytest.approx((total[:, 0] / total[:, 1]).sum() / 4, rel=2e-4)
    left = [np.delete(each, i, 0).sum(0) for i in range(4)]
    one_out = np.array([(t[:, 0] / t[:, 1]).sum() / 4 for t in left])
    jackknife = np.sqrt(3 / 4 * ((one_out - one_out.mean()) ** 2).sum())
    assert got.stderr["block.1"][0] == pytest.approx(jackknife, rel=0.3)


def jacobian(model: Any, ids: Tensor, block: int, depth: str = "model.layers") -> Tensor:
    """∂ Σ_t h'[t, i] / ∂ h[s, j], averaged over sequences and s, float64 [width, width]: each entry by itself."""
    layer, seen = model.get_submodule(depth)[block], []
    handle = layer.register_forward_pre_hook(lambda _, a, k: seen.append((a, k)), with_kwargs=True)
    with torch.no_grad():
        model(ids, **({"use_cache": False} if hasattr(model, "config") else {}))
    handle.remove()
    (stream, *rest), kwargs = seen[0][0], seen[0][1]

    def out(h: Tensor) -> Tensor:
        found = layer(h, *rest, **kwargs)
        return (found[0] if isinstance(found, tuple) else found).sum(1)

    full = torch.autograd.functional.jacobian(out, stream)  # [sequences, width, sequences, tokens, width]
    own = torch.stack([full[b, :, b] for b in range(len(ids))]).double()
    return own.mean((0, 2))


@pytest.mark.parametrize(
    ("name", "where"), [("llama", "model.layers"), ("gpt2", "transformer.h"), ("nanogpt", "blocks")]
)
def test_exact_jacobians_are_the_papers(name: str, where: str) -> None:
    model, ids = tiny(name), text(3, 6)
    got = MEASURES.make("jacobian", {"probes": 0}).measure(Lab(model, ids, batch_size=2))
    for n in range(4):
        j = jacobian(model, ids, n, where)
        off = j - torch.diag(j.diagonal())
        wanted = [
            float((j - torch.eye(32)).norm()) / 32,
            float(off.norm()) / (32 * 32 - 32) ** 0.5,
            float(j.diagonal().mean()),
            float(j.diagonal().std()),
            float(j.norm()),
            float(torch.linalg.svdvals(j)[0]),
        ]
        assert got[f"block.{n}"] == pytest.approx(wanted[0], rel=1e-4)
        assert got.grids["jacobian"].values[n] == pytest.approx(wanted, rel=1e-3, abs=1e-6)


def test_random_products_estimate_the_norm() -> None:
    model = tiny("llama")
    lab = Lab(model, own_text(model, 6, 10))
    exact = MEASURES.make("jacobian", {"probes": 0}).measure(lab)
    rough = MEASURES.make("jacobian", {"probes": 64}).measure(lab)
    other = MEASURES.make("jacobian", {"probes": 64, "seed": 5}).measure(lab)
    for block in exact.values:
        assert rough[block] == pytest.approx(exact[block], rel=0.1)
        assert rough[block] != other[block]
    assert exact.ranked() == rough.ranked() == other.ranked()
    assert not rough.grids


def test_an_identity_block_has_the_identity() -> None:
    lab = Lab(tiny("llama"), text(3, 9))
    silence(lab.anatomy, "block.1")
    for probes in (0, 4):
        assert MEASURES.make("jacobian", {"probes": probes}).measure(lab)["block.1"] == 0.0


def test_backwards_are_counted() -> None:
    lab = Lab(tiny("llama"), text(3, 9))
    MEASURES.make("jacobian", {"probes": 3}).measure(lab)
    assert lab.counts.blocks == lab.depth * lab.tokens
    assert lab.counts.backwards == 3 * lab.depth * lab.tokens


def test_wrong_options_are_refused() -> None:
    for options, line in (({"probes": -1}, "probes is at least 0"), ({"sequences": 0}, "sequences is at least 1")):
        with pytest.raises(InputError, match=line):
            MEASURES.make("jacobian", options)
