"""Taps against literal loops: what a measure sees of a site, with padding gone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lamina.core.scores import Scores
from lamina.core.sites import Kind, Site
from lamina.lab import Lab, Taps
from lamina.testing import zoo
from lamina.testing.bench import lab_on, rows
from lamina.testing.models import padded, text


def taps(dtype: torch.dtype = torch.float32) -> Taps:
    generator = torch.Generator().manual_seed(0)
    x, f = (torch.randn(7, 5, generator=generator).to(dtype) for _ in range(2))
    return Taps(x, f, torch.tensor([0, 0, 0, 1, 1, 2, 2]), 3)


def test_literal_sums() -> None:
    t = taps()
    for i in range(7):
        x, y = t.entering[i].tolist(), (t.entering[i] + t.added[i]).tolist()
        dot = math.fsum(a * b for a, b in zip(x, y, strict=True))
        norms = math.sqrt(math.fsum(a * a for a in x) * math.fsum(b * b for b in y))
        assert float(t.cosine[i]) == pytest.approx(dot / norms, abs=1e-6)
        assert float(t.xy[i]) == pytest.approx(dot, rel=1e-5)
        assert float(t.ff[i]) == pytest.approx(math.fsum(v * v for v in t.added[i].tolist()), rel=1e-5)
    assert t.cosine.dtype == torch.float64
    assert t.last.tolist() == [2, 4, 6]
    sums, counts = t.per_sequence(torch.arange(7.0))
    assert (sums.tolist(), counts.tolist()) == ([3.0, 7.0, 11.0], [3.0, 2.0, 2.0])
    assert sums.dtype == counts.dtype == torch.float64


def test_a_silent_site_has_cosine_one_exactly() -> None:
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    x[3] = 0
    still = Taps(x, torch.zeros_like(x), torch.zeros(9, dtype=torch.long), 1)
    assert bool((still.cosine == 1).all())
    loud = Taps(torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2, dtype=torch.long), 1)
    assert loud.cosine.tolist() == [0.0, 0.0]


def test_sixteen_bits_are_lifted() -> None:
    t = taps(torch.bfloat16)
    assert {v.dtype for v in (t.x, t.f, t.leaving)} == {torch.float32}
    assert {v.dtype for v in (t.xx, t.xy, t.yy, t.ff)} == {torch.float64}
    assert torch.equal(t.leaving, t.entering.float() + t.added.float())


class Recorder:
    """A tally that keeps all that it sees."""

    def __init__(self) -> None:
        self.seen: list[tuple[Site, Taps]] = []

    def add(self, site: Site, taps: Taps) -> None:
        self.seen.append((site, taps))

    def merge(self, other: Any) -> Any:
        return other

    def scores(self) -> Scores:
        return Scores(measure="recorder", values={})


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2"])
def test_the_lab_hands_out_the_rows_own_tokens(name: str, side: str) -> None:
    """Literal: each row alone through the model, states taken by hooks on the blocks."""
    bench, recorder = lab_on(padded(rows(), 4, side=side), name), Recorder()
    bench.stream([recorder])
    order = [s.id for s, _ in recorder.seen[: len(bench.anatomy.sites)]]
    assert order == [s.id for s in bench.anatomy.sites]
    assert len(recorder.seen) == 2 * len(order)
    alone: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for row in rows():
        for site in bench.anatomy.of_kind(Kind.BLOCK):
            alone.setdefault(site.id, []).append(through(bench, site, row))
    for batch, first in enumerate((0, 4)):
        for site, found in recorder.seen[batch * len(order) : (batch + 1) * len(order)]:
            lengths = [len(r) for r in rows()[first : first + 4]]
            assert torch.bincount(found.sequence).tolist() == lengths
            assert found.sequences == len(lengths)
            if site.kind is Kind.BLOCK:
                states = alone[site.id][first : first + 4]
                torch.testing.assert_close(found.entering, torch.cat([a for a, _ in states]), rtol=0, atol=2e-5)
                torch.testing.assert_close(found.leaving, torch.cat([b for _, b in states]), rtol=0, atol=2e-5)


@torch.no_grad()
def through(bench: Any, site: Site, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    held: list[torch.Tensor] = []

    def note(_: Any, args: Any, kwargs: Any, out: Any) -> None:
        held.extend([args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out])

    handle = bench.model.get_submodule(site.path).register_forward_hook(note, with_kwargs=True)
    bench.model(row.unsqueeze(0), use_cache=False)
    handle.remove()
    return tuple(h.reshape(len(row), -1) for h in held)  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "falcon", "gemma2", "granite"])
def test_sublayers_chain_up_to_the_block(name: str) -> None:
    bench, recorder = lab_on(padded(rows(), 3), name), Recorder()
    bench.stream([recorder])
    for place in range(0, len(recorder.seen), 3):
        (_, block), (_, mixes), (site, feeds) = recorder.seen[place : place + 3]
        torch.testing.assert_close(block.added, mixes.added + feeds.added, rtol=0, atol=1e-5)
        torch.testing.assert_close(block.leaving, block.entering + block.added, rtol=0, atol=1e-5)
        assert torch.equal(mixes.entering, block.entering)
        serial = bool(bench.anatomy.branch(site).reads)
        assert serial == (name not in ("gpt_neox", "falcon"))
        want = block.entering + mixes.added if serial else block.entering
        assert torch.equal(feeds.entering, want)


def test_branches_of_a_post_norm_model_see_the_stream_that_they_join() -> None:
    """openai-gpt norms after each addition: x → ln_1(x + attn(x)) → ln_2(… + mlp(…))."""
    specimen = zoo.build("openai-gpt")
    bench = Lab(specimen.model, text(2, 7))
    recorder = Recorder()
    bench.stream([recorder])
    found = {site.id: taps for site, taps in recorder.seen}
    blocks = specimen.model.get_submodule(bench.anatomy.stacks[0].path)
    with torch.no_grad():
        stream = specimen.model.transformer(bench.batches[0]["input_ids"], output_hidden_states=True).hidden_states[0]
        for number, block in enumerate(blocks):
            attended = block.attn(stream)[0]
            middle = block.ln_1(stream + attended)
            fed = block.mlp(middle)
            after = block.ln_2(middle + fed)
            for name, entering, added in (("attention", stream, attended), ("mlp", middle, fed)):
                taps_ = found[f"block.{number}.{name}"]
                torch.testing.assert_close(taps_.x, entering.flatten(0, 1))
                torch.testing.assert_close(taps_.f, added.flatten(0, 1))
            torch.testing.assert_close(found[f"block.{number}"].x, stream.flatten(0, 1))
            torch.testing.assert_close(found[f"block.{number}"].leaving, after.flatten(0, 1))
            stream = after
