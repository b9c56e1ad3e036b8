"""LoRA with logit distillation: low-rank corrections that teach the thinned model what the dense one says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.core.errors import InputError
from lamina.core.papers import Paper
from lamina.core.registry import healer

if TYPE_CHECKING:
    from torch import nn

    from lamina.anatomy import Anatomy
    from lamina.core.documents import Receipt
    from lamina.lab import Lab

PAPER = Paper(
    key="hu2022lora",
    title="LoRA: Low-Rank Adaptation of Large Language Models",
    authors=(
        "Edward J. Hu", "Yelong Shen", "Phillip Wallis", "Zeyuan Allen-Zhu", "Yuanzhi Li", "Shean Wang", "Lu Wang",
        "Weizhu Chen",
    ),
    year=2022,
    arxiv="2106.09685",
    venue="International Conference on Learning Representations",
)  # fmt: skip
Watcher = Callable[[int, int, float], None]
"""(step, steps, loss): called after every step."""


@dataclass(frozen=True)
class History:
    """What the healing did: the loss of each step, tokens that were trained on, seconds of all sittings together."""

    losses: tuple[float, ...]
    tokens: int
    seconds: float
    trained: int
    """Parameters of the adapters."""
    changed: int
    """Tensors of the model that were changed."""
    resumed: int = 0
    """The step at which this sitting began."""

    @property
    def steps(self) -> int:
        """Steps of all sittings together."""
        return len(self.losses)

    def facts(self) -> dict[str, Any]:
        """What is the same in every run of the same budget: for the receipts."""
        return {"healer": "lora", "steps": self.steps, "tokens": self.tokens, "adapter_parameters": self.trained}


@healer(
    "lora",
    PAPER,
    status="stable",
    deviations=(
        "the loss is KL(dense‖thinned) of the logits (Hinton et al., arXiv 1503.02531), not a task's",
        "every linear layer of the blocks is adapted, not the attention's projections alone",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Lora:
    """Train low-rank adapters against the dense model's logits, then merge them into the weights.

    `alpha` scales the adapters by alpha / rank, `lr` is AdamW's peak rate (linear warm-up over the `warmup` share of
    the budget, then a cosine to 0), `batch` the sequences of a step. The loss is temperature² · KL(dense‖thinned) of
    the softened logits, per token, plus `cross_entropy` times the next-token loss; without a teacher the latter alone.
    """

    rank: int = 16
    alpha: float = 32.0
    lr: float = 1e-3
    batch: int = 2
    warmup: float = 0.1
    temperature: float = 1.0
    cross_entropy: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "lr", "batch", "temperature", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the budget, not {self.warmup}")
        if self.cross_entropy < 0 or self.weight_decay < 0:
            raise ValueError("cross_entropy and weight_decay must not be negative")

    def touches(self, anatomy: Anatomy, receipts: Sequence[Receipt] = (), /) -> frozenset[str]:
        """The parameters that healing changes: the weights of all linear layers inside the blocks."""
        from lamina.healers._lora_adapters import targets

        return frozenset(f"{path}.weight" for path in targets(anatomy))

    def heal(
        self,
        lab: Lab,
        /,
        *,
        teacher: nn.Module | None,
        steps: int | None = None,
        minutes: float | None = None,
        state_dir: Path | None = None,
        every: int = 10,
        watch: Watcher | None = None,
    ) -> History:
        """Train `lab.model` in place on the lab's text, for `steps` or `minutes`; its structure stays as it is.

        With `state_dir` the state is kept there after every `every` steps, and a run that was killed goes on from it:
        by steps, to the same weights, bit for bit (one process, one device; by minutes the number of steps varies).
        If training is interrupted, the model is as it was before.
        Raises InputError for a loss that is no number and for a state that belongs to another run.
        """
        from lamina.healers._lora_train import Budget, train

        if (steps is None) == (minutes is None):
            raise InputError("healing takes exactly one of steps and minutes")
        if (steps if steps is not None else minutes or 0) <= 0:
            raise InputError(f"healing takes a positive budget, not {steps if steps is not None else minutes}")
        return train(self, lab, teacher, Budget(steps, minutes), state_dir=state_dir, every=every, watch=watch)

    def options(self) -> Mapping[str, Any]:
        """The options as plain data."""
        return dict(vars(self))
