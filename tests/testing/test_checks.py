"""The checks themselves: each tells a bad method from a good one, and a declared failure is kept to its word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import lamina.testing
from lamina.core.papers import Card, Need
from lamina.core.registry import MEASURES, PLANNERS
from lamina.core.scores import Scores
from lamina.core.sites import Kind
from lamina.testing import checks_for, known_failures
from lamina.testing.suite import run_checks

GOOD = type(MEASURES.make("cosine"))
CARD: Card = MEASURES.card("cosine")


def scaled(scores: Scores, **changes: Any) -> Scores:
    return replace(scores, **changes)


class Base:
    """The cosine, with a mistake added."""

    card: ClassVar[Card] = CARD

    def measure(self, lab: Any) -> Scores:
        return GOOD().measure(lab)

    def tally(self, anatomy: Any) -> Any:
        return GOOD().tally(anatomy)


class WrongSign(Base):
    def measure(self, lab: Any) -> Scores:
        scores = super().measure(lab)
        return scaled(scores, values={k: -v for k, v in scores.values.items()})


class WrongType(Base):
    def measure(self, lab: Any) -> Scores:
        scores = super().measure(lab)
        return scaled(scores, values={k: v.astype(np.float32) for k, v in scores.values.items()})


class WrongShape(Base):
    def measure(self, lab: Any) -> Scores:
        scores = super().measure(lab)
        return scaled(scores, values={k: np.float64(v[0]) for k, v in scores.values.items()}, stderr={})


class NotFinite(Base):
    def measure(self, lab: Any) -> Scores:
        scores = super().measure(lab)
        return scaled(scores, values={**scores.values, "block.1": np.array([np.nan])})


class WrongName(Base):
    def measure(self, lab: Any) -> Scores:
        return scaled(super().measure(lab), measure="another")


class TooMuch(Base):
    card = replace(CARD, on=(Kind.BLOCK,))


class TooLittle(Base):
    def measure(self, lab: Any) -> Scores:
        scores = super().measure(lab)
        return scaled(scores, values={k: v for k, v in scores.values.items() if k != "block.1.mlp"}, stderr={})


class Random(Base):
    def measure(self, lab: Any) -> Scores:
        scores = super().measure(lab)
        return scaled(scores, values={k: v + 1e-9 * torch.rand(1).double().numpy() for k, v in scores.values.items()})


class LeavesHook(Base):
    def measure(self, lab: Any) -> Scores:
        lab.model.register_forward_hook(lambda *_: None)
        return super().measure(lab)


class LeavesAttribute(Base):
    def measure(self, lab: Any) -> Scores:
        next(iter(lab.model.children())).seen = True
        return super().measure(lab)


class LeavesForward(Base):
    def measure(self, lab: Any) -> Scores:
        lab.model.forward = lab.model.forward
        return super().measure(lab)


class LeavesGradients(Base):
    def measure(self, lab: Any) -> Scores:
        for parameter in lab.model.parameters():
            parameter.requires_grad_(False)
        return super().measure(lab)


class LeavesMode(Base):
    def measure(self, lab: Any) -> Scores:
        lab.model.train()
        return super().measure(lab)


class LeavesWeights(Base):
    def measure(self, lab: Any) -> Scores:
        scores = super().measure(lab)
        with torch.no_grad():
            next(iter(lab.model.parameters()))[0, 0] += 1e-6
        return scores


class LeavesSeed(Base):
    def measure(self, lab: Any) -> Scores:
        torch.manual_seed(12345)
        return super().measure(lab)


class MeanOfBatches(Base):
    def measure(self, lab: Any) -> Scores:
        parts = [GOOD().measure(lab.on([b])) for b in lab.batches]
        values = {k: np.mean([p.values[k] for p in parts], axis=0) for k in parts[0].values}
        return Scores(measure="cosine", values=values)


class CountsPadding(Base):
    def measure(self, lab: Any) -> Scores:
        return GOOD().measure(lab.on([{"input_ids": b["input_ids"]} for b in lab.batches]))


class TokenErrors(Base):
    def measure(self, lab: Any) -> Scores:
        scores = super().measure(lab)
        return scaled(scores, stderr={k: v / 10 for k, v in scores.stderr.items()})


class TwoPasses(Base):
    def measure(self, lab: Any) -> Scores:
        super().measure(lab)
        return super().measure(lab)


class Greedy(Base):
    """Declares that it needs nothing, yet reads the text."""

    card = replace(CARD, needs=Need.NOTHING)


class BadMerge(Base):
    def tally(self, anatomy: Any) -> Any:
        good = super().tally(anatomy)

        class Forgets(type(good)):  # type: ignore[misc]
            def merge(self, other: Any) -> Any:
                return self

        good.__class__ = Forgets
        return good


@pytest.mark.parametrize(
    ("bad", "check"),
    [
        (WrongSign, "identity_block_is_lowest"),
        (WrongSign, "silent_sublayer_is_lowest"),
        (WrongType, "scores_are_finite_float64_of_width"),
        (WrongShape, "scores_are_finite_float64_of_width"),
        (NotFinite, "scores_are_finite_float64_of_width"),
        (WrongName, "scores_are_finite_float64_of_width"),
        (TooMuch, "scores_what_its_card_declares"),
        (TooLittle, "scores_what_its_card_declares"),
        (Random, "measure_is_deterministic"),
        (LeavesHook, "measure_leaves_the_model_untouched"),
        (LeavesAttribute, "measure_leaves_the_model_untouched"),
        (LeavesForward, "measure_leaves_the_model_untouched"),
        (LeavesGradients, "measure_leaves_the_model_untouched"),
        (LeavesMode, "measure_leaves_the_model_untouched"),
        (LeavesWeights, "measure_leaves_the_model_untouched"),
        (LeavesSeed, "measure_leaves_the_model_untouched"),
        (CountsPadding, "right_padding_does_not_count"),
        (CountsPadding, "left_padding_does_not_count"),
        (MeanOfBatches, "batching_does_not_count"),
        (TokenErrors, "errors_are_over_sequences"),
        (TwoPasses, "needs_are_honest"),
        (Greedy, "needs_are_honest"),
        (BadMerge, "tally_merges"),
    ],
)
def test_a_bad_measure_is_told(bad: type, check: str) -> None:
    function = {c.__name__: c for c in checks_for("measure")}[f"check_{check}"]
    function(Base)
    with pytest.raises(AssertionError) as caught:
        function(bad)
    assert len(str(caught.value)) > 20


class Declared(WrongSign):
    known_failures: ClassVar[Mapping[str, str]] = {
        "check_identity_block_is_lowest": "the sign is wrong",
        "check_silent_sublayer_is_lowest": "the sign is wrong",
        "check_streaming_measure_agrees_with_measure": "only one of them has the wrong sign",
        "check_order_of_batches_and_blocks_does_not_count": "only one of them has the wrong sign",
    }


class Overdeclared(Declared):
    known_failures: ClassVar[Mapping[str, str]] = {**Declared.known_failures, "check_needs_are_honest": "not so"}


def test_a_declared_failure_is_kept_to_its_word() -> None:
    run_checks("measure", Declared)
    with pytest.raises(AssertionError, match=r"check_needs_are_honest: passes, but is declared to fail \(not so\)"):
        run_checks("measure", Overdeclared)
    with pytest.raises(AssertionError, match="check_identity_block_is_lowest: AssertionError: on llama, the identity"):
        lamina.testing.check_measure(WrongSign)


def test_a_declaration_of_nothing_is_refused() -> None:
    class Wrong(Base):
        known_failures: ClassVar[Mapping[str, str]] = {"check_nothing": "x"}

    class Silent(Base):
        known_failures: ClassVar[Mapping[str, str]] = {"check_tally_merges": " "}

    with pytest.raises(AssertionError, match="which is no check"):
        known_failures(Wrong)
    with pytest.raises(AssertionError, match="no reason"):
        known_failures(Silent)
    with pytest.raises(AssertionError, match="has no card"):
        known_failures(object)


def test_the_public_entry_points_take_a_class_or_an_instance() -> None:
    lowest = type(PLANNERS.make("lowest"))
    lamina.testing.check_planner(lowest)
    lamina.testing.check_planner(lowest())
    assert {n for n in lamina.testing.__all__ if n.startswith("check_")} == {
        f"check_{role}" for role in ("measure", "planner", "rewrite", "healer", "evaluator", "exporter")
    }


@dataclass(frozen=True)
class Unregistered:
    """No decorator."""


def test_what_is_not_registered_is_told() -> None:
    with pytest.raises(AssertionError, match="Unregistered has no card"):
        lamina.testing.check_measure(Unregistered)
