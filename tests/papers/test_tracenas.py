"""TraceNAS's gradient traces (arXiv 2602.02891) against adapters that are really attached, and backward()."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamina.core.errors import InputError, UnsupportedError
from lamina.core.registry import MEASURES
from lamina.core.scores import Scores
from lamina.lab import Lab
from lamina.lab.probes import noise_of
from lamina.testing.models import lively, padded, text, tiny
from lamina.testing.planted import silence

MAPS = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
SITES = [f"block.{n}{part}" for n in range(4) for part in ("", ".attention", ".mlp")]


def measured(lab: Lab, **options: Any) -> Scores:
    return MEASURES.make("gradient-trace", options).measure(lab)


@contextmanager
def adapters(model: Any, rank: int) -> Iterator[dict[str, list[nn.Parameter]]]:
    """y = Wx + B A x on every map of a llama's layers, B = 0; the B of each sublayer."""
    found: dict[str, list[nn.Parameter]] = {}
    with ExitStack() as held:
        for n in range(4):
            for part, names in MAPS.items():
                for name in names:
                    layer = model.model.layers[n]
                    map_: Any = getattr(layer.self_attn if part == "attention" else layer.mlp, name)
                    site, inputs = f"block.{n}.{part}", map_.in_features
                    noise = noise_of(f"{site}.{name}", "adapter", 0)
                    down = (torch.rand(rank, inputs, generator=noise) * 2 - 1) / inputs**0.5
                    up = nn.Parameter(torch.zeros(map_.out_features, rank))
                    found.setdefault(site, []).append(up)
                    hook = lambda _, a, y, up=up, down=down: y + a[0] @ down.T @ up.T  # noqa: E731
                    held.callback(map_.register_forward_hook(hook).remove)
        yield found


def traces(model: Any, rows: list[Tensor], gone: list[str], rank: int, literal: ModuleType) -> dict[str, Tensor]:
    """Gradients of the mean loss over all tokens; what is gone is masked before the adapters see it."""
    with literal.masked(model, "llama", gone), adapters(model, rank) as ups:
        count = sum(len(r) - 1 for r in rows)
        for row in rows:
            ids = row.unsqueeze(0)
            (model(ids, labels=ids, use_cache=False).loss * (len(row) - 1) / count).backward()
        return {site: torch.cat([u.grad.flatten() for u in mine]).double() for site, mine in ups.items()}


def test_is_the_papers_proxy(literal: ModuleType) -> None:
    model = tiny("llama")
    rows = [text(1, n, seed=n)[0] for n in (9, 4, 12)]
    got = measured(Lab(model, padded(rows, 2)), rank=5)
    whole = traces(model, rows, [], 5, literal)
    grid = got.grids["correlations"]
    assert grid.columns == tuple(whole)
    assert list(got.values) == SITES
    for number, site in enumerate(SITES):
        gone = literal.parts("llama", site)
        thinned = traces(model, rows, gone, 5, literal)
        wanted = {
            s: float(torch.corrcoef(torch.stack([whole[s], thinned[s]]))[0, 1]) if s not in gone else 0.0 for s in whole
        }
        assert grid.values[number] == pytest.approx(list(wanted.values()), abs=2e-4), site
        assert got[site] == pytest.approx(len(whole) - sum(wanted.values()), abs=1e-3), site


def test_removing_what_adds_nothing_costs_its_own_term_alone() -> None:
    for name in ("llama", "gpt_neox", "mixtral"):
        lab = Lab(tiny(name), text(3, 9))
        silence(lab.anatomy, "block.1")
        got = measured(lab)
        assert got["block.1"] == pytest.approx(2.0, abs=1e-6)
        assert got["block.1.attention"] == pytest.approx(1.0, abs=1e-6)


def test_the_scale_of_the_loss_is_no_matter() -> None:
    """A text that is there twice has gradients twice as large."""
    model, ids = tiny("llama"), text(3, 9)
    once, twice = (measured(Lab(model, t), sequences=None) for t in (ids, ids.repeat(2, 1)))
    for site in once.values:
        assert once[site] == pytest.approx(twice[site], abs=1e-5)


def test_errors_are_the_jackknife_over_sequences() -> None:
    model, ids = tiny("llama"), text(4, 9)
    got = measured(Lab(model, ids))
    left = [measured(Lab(model, torch.cat([ids[:i], ids[i + 1 :]]))) for i in range(4)]
    for site in got.values:
        values = torch.tensor([scores[site] for scores in left])
        spread = float((3 / 4 * ((values - values.mean()) ** 2).sum()).sqrt())
        assert got.stderr[site][0] == pytest.approx(spread, rel=1e-2), site


def test_passes_are_counted() -> None:
    lab = Lab(tiny("llama"), text(3, 9))
    measured(lab)
    assert lab.counts.blocks == lab.counts.backwards == (len(SITES) + 1) * lab.depth * lab.tokens


def test_a_model_that_predicts_no_tokens_is_refused() -> None:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    lab = Lab(lively(transformers.BertForMaskedLM(transformers.BertConfig(**sizes, vocab_size=99))), text(2, 8))
    with pytest.raises(UnsupportedError, match="predicts no next tokens"):
        measured(lab)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(InputError, match="rank is at least 1, not 0"):
        MEASURES.make("gradient-trace", {"rank": 0})
