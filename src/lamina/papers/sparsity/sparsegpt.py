"""SparseGPT: column by column, what a zero costs is made up for by the columns behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lamina.core.documents import Step
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import rewrite
from lamina.core.sites import Kind
from lamina.rewrites.sparsify import Given, Informed, examples

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.anatomy import Anatomy

PAPER = Paper(
    key="frantar2023sparsegpt",
    title="SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
    authors=("Elias Frantar", "Dan Alistarh"),
    year=2023,
    arxiv="2301.00774",
)


@rewrite(
    "sparsegpt",
    PAPER,
    on=Kind.LINEAR,
    needs=Need.FORWARD,
    status="stable",
    deviations=(
        "inputs are the dense network's unless in_turn, which prunes block by block as the paper does",
        "int(n · sparsity) of the n weights of a run of columns go; the code's threshold takes one more, and all ties",
        "an input that is always zero gets the others' mean power and not 1, so that no scale of inputs matters",
        "float64 throughout; the weights are not quantised on the way",
    ),
)
@dataclass(frozen=True, kw_only=True)
class SparseGpt(Informed):
    """Set weights to zero by what each costs the outputs, and let the inputs behind it make up for it.

    H = Σ x xᵀ + `damping` · mean(diag) · I, U upper triangular with Uᵀ U = H⁻¹. From input to input j, the weights w_ij
    of lowest (w_ij / U_jj)² go, chosen in runs of `columns` inputs over all outputs (of a pattern, in its groups, from
    the weights as they are by then), and row i changes by -(w_ij / U_jj) U_j from j on. One pass over the text;
    `in_turn`: up to two.
    """

    card: ClassVar[Card]

    columns: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.columns < 1:
            raise ValueError(f"columns is at least 1, not {self.columns}")
        if not self.damping > 0:
            raise ValueError(f"damping is above 0, not {self.damping:g}")

    def sparse(self, given: Given) -> Tensor:
        """The weights behind the sweep."""
        assert given.second is not None
        live = given.second.diagonal() > 0
        run = max(self.columns // given.group, 1) * given.group if given.group else self.columns
        return sweep(given.weight * live, root_of_inverse(given.second, self.damping), given, run)

    @staticmethod
    def examples(anatomy: Anatomy) -> tuple[Step, ...]:
        """Steps that the conformance suite tries, one of them block by block."""
        return examples("sparsegpt", anatomy, {}, {"in_turn": True}, {"columns": 12})


def root_of_inverse(moment: Tensor, damping: float) -> Tensor:
    """U [inputs, inputs], upper triangular with Uᵀ U = (moment + damping · mean(diag) · I)⁻¹, float64.

    An input that is always zero counts as one by itself with the mean power of the others (1 if all are zero).
    """
    import torch

    power = moment.diagonal()
    live = power > 0
    mean = power[live].mean() if bool(live.any()) else power.new_ones(())
    hessian = moment + torch.diag(torch.where(live, 0.0, mean) + damping * mean)
    # reading both dimensions backwards turns the lower factor L Lᵀ into an upper one R Rᵀ, and U = R⁻¹
    upper = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(upper, eye, upper=True)


def sweep(weight: Tensor, upper: Tensor, given: Given, run: int) -> Tensor:
    """`weight` [outputs, inputs] pruned input by input, in runs of `run`; `upper` is U [inputs, inputs]."""
    import torch

    out = weight.clone()
    for start in range(0, weight.shape[1], run):
        part = slice(start, start + run)
        here, own = out[:, part].T.contiguous(), upper[part, part]
        size = own.diagonal().unsqueeze(1)
        errors = torch.zeros_like(here)
        gone = torch.zeros_like(here, dtype=torch.bool)
        if not given.group:
            gone = given.lowest((here / size).square().T, rows=False).T
        for j in range(len(here)):
            if given.group and j % given.group == 0:
                ahead = slice(j, j + given.group)
                gone[ahead] = given.lowest((here[ahead] / size[ahead]).square().T, rows=True).T
            errors[j] = torch.where(gone[j], here[j] / size[j], 0.0)
            here[j + 1 :].addr_(own[j, j + 1 :], errors[j], alpha=-1)
            here[j] = here[j].masked_fill(gone[j], 0.0)
        out[:, part] = here.T
        out[:, start + run :] -= errors.T @ upper[part, start + run :]
    return out
