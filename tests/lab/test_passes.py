"""Passes that measures share: one forward, one backward per probe, one sweep; a model that does not allow a measure."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_kinds
import torch

from lamina.anatomy import Anatomy
from lamina.core.errors import UnsupportedError
from lamina.core.papers import Need
from lamina.core.registry import MEASURES
from lamina.lab import Lab
from lamina.lab.passes import finished, merged, own, shares, tallied
from lamina.testing.bench import expect_close
from lamina.testing.models import text, tiny

SHARED = {n: m for n in MEASURES if shares(m := MEASURES.make(n))}
STREAMING = {n: m for n, m in SHARED.items() if m.card.needs is Need.FORWARD}
GRADED = {n: m for n, m in SHARED.items() if m.card.needs is Need.GRADIENT}


def test_all_streaming_measures_share_one_forward() -> None:
    lab = Lab(tiny("llama"), text(4, 12))
    lab.anatomy.linears()
    tallied(lab, STREAMING)
    assert lab.counts.blocks == lab.tokens * lab.depth
    assert (lab.counts.heads, lab.counts.backwards) == (0, 0)
    assert len(STREAMING) >= 15


def test_with_gradients_they_share_that_forward_too() -> None:
    lab = Lab(tiny("llama"), text(4, 12))
    found = tallied(lab, {**STREAMING, **GRADED})
    probes = {p for n in GRADED for p in found[n].probes}
    assert lab.counts.blocks == lab.tokens * lab.depth
    assert lab.counts.backwards == len(probes) * lab.tokens * lab.depth


def test_sharing_changes_no_score() -> None:
    lab = Lab(tiny("llama"), text(4, 12))
    together = tallied(lab, {**STREAMING, **GRADED})
    for name in ("cosine", "angular", "damage"):
        measure = SHARED[name]
        alone = tallied(Lab(tiny("llama"), text(4, 12)), {name: measure})[name]
        expect_close(finished(lab, measure, together[name]), finished(lab, measure, alone), 1e-5, name)


class Refuses:
    card = MEASURES.card("cosine")

    def __init__(self, when: str) -> None:
        self.when = when

    def tally(self, anatomy: Anatomy) -> Any:
        if self.when == "tally":
            raise UnsupportedError("not for this model")
        return self

    def add(self, site: Any, taps: Any) -> None:
        if self.when == "add":
            raise UnsupportedError("not for this model")

    def merge(self, other: Any) -> Any:
        return self

    def scores(self) -> Any:
        raise UnsupportedError("not for this model")

    def measure(self, lab: Lab) -> Any:
        raise UnsupportedError("not for this model")


@pytest.mark.parametrize("when", ["tally", "add", "scores"])
def test_a_measure_that_the_model_does_not_allow_says_why_and_spoils_no_other(when: str) -> None:
    lab = Lab(tiny("llama"), text(4, 12))
    refusing, good = Refuses(when), MEASURES.make("cosine")
    found = tallied(lab, {"refusing": refusing, "good": good})
    table = finished(lab, refusing, merged([found["refusing"], found["refusing"]]))
    assert "not for this model" in table.missing[""]
    assert not table.values
    assert len(finished(lab, good, found["good"]).values) == 12
    assert "not for this model" in own(lab, refusing).missing[""]


def test_other_faults_are_no_refusals() -> None:
    class Broken(Refuses):
        def add(self, site: Any, taps: Any) -> None:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        tallied(Lab(tiny("llama"), text(2, 6)), {"broken": Broken("never")})


@pytest.mark.parametrize("kind", ["bert", "vit", "t5", "swin"])
def test_every_measure_scores_other_kinds_of_model_or_says_why(kind: str) -> None:
    model, sample = getattr(tiny_kinds, kind)()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    batches = [{k: torch.cat([v, v.flip(1) if k != "pixel_values" else v + 0.1]) for k, v in sample.items()}]
    lab = Lab(model.eval(), batches, anatomy=Anatomy.of(model, {k: v[:1] for k, v in sample.items()}))
    found = tallied(lab, SHARED)
    for name, measure in SHARED.items():
        table = finished(lab, measure, found[name])
        assert table.values or table.missing, name
        assert all(w for w in table.missing.values()), name
    scored = [n for n in SHARED if finished(lab, SHARED[n], found[n]).values]
    assert {"cosine", "block-influence", "relative-contribution"} <= set(scored)


def test_passes_of_one_module_have_no_gradients_but_the_rest(tmp_path: Any) -> None:
    from transformers import AlbertConfig, AlbertForMaskedLM

    config = AlbertConfig(
        vocab_size=99, embedding_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    lab = Lab(AlbertForMaskedLM(config).eval(), text(3, 9))
    names = ("cosine", "damage")
    found = tallied(lab, {n: SHARED[n] for n in names})
    assert "passes of one module" in finished(lab, SHARED["damage"], found["damage"]).missing[""]
    assert finished(lab, SHARED["cosine"], found["cosine"]).values
