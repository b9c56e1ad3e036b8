"""SparseGPT (arXiv 2301.00774) against the sweep in loops, closed forms of optimal brain surgery, and identities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lamina.core.documents import Step
from lamina.core.errors import InputError
from lamina.core.registry import REWRITES
from lamina.lab import Lab
from lamina.papers.sparsity.sparsegpt import root_of_inverse, sweep
from lamina.rewrites.sparsify import Given
from lamina.testing.models import text, tiny

DAMPING = 0.01


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(count: int, tokens: int = 60, seed: int = 0) -> Tensor:
    """Correlated inputs [tokens, count] of uneven size."""
    return drawn(tokens, count, seed=seed) @ drawn(count, count, seed=seed + 1) + drawn(count, seed=seed + 2)


def hessian(moment: Tensor) -> Tensor:
    """As the method damps it; none of the inputs is always zero."""
    return moment + DAMPING * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)


def pruned(
    weight: Tensor, moment: Tensor, share: float = 0.5, pattern: tuple[int, int] = (0, 0), **options: Any
) -> Tensor:
    given = Given(
        site="a", weight=weight.clone(), share=share, zeros=pattern[0], group=pattern[1], second=moment, tokens=60
    )
    return REWRITES.make("sparsegpt", options).sparse(given)


def literal(weight: Tensor, moment: Tensor, share: float, pattern: tuple[int, int], columns: int) -> Tensor:
    """Weight by weight, all in Python, with both Cholesky factors as the paper has them."""
    zeros, group = pattern
    dead = moment.diagonal() == 0
    h = moment.clone()
    h[dead, dead] = moment.diagonal()[~dead].mean()
    h += DAMPING * moment.diagonal()[~dead].mean() * torch.eye(len(h), dtype=torch.float64)
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    w = [[0.0 if dead[j] else float(v) for j, v in enumerate(row)] for row in weight]
    rows, count = range(len(w)), len(w[0])
    for start in range(0, count, columns):
        stop = min(start + columns, count)
        places = sorted((w[i][j] ** 2 / float(u[j, j]) ** 2, i, j) for i in rows for j in range(start, stop))
        mask = {(i, j) for _, i, j in places[: int(len(places) * share)]} if not group else set[tuple[int, int]]()
        for j in range(start, stop):
            if group and (j - start) % group == 0:
                for i in rows:
                    ahead = sorted((w[i][k] ** 2 / float(u[k, k]) ** 2, k) for k in range(j, j + group))
                    mask |= {(i, k) for _, k in ahead[:zeros]}
            for i in rows:
                if (i, j) in mask:
                    error = w[i][j] / float(u[j, j])
                    for k in range(j + 1, count):
                        w[i][k] -= error * float(u[j, k])
                    w[i][j] = 0.0
    return torch.tensor(w, dtype=torch.float64)


@pytest.mark.parametrize("columns", [1, 4, 12, 128])
@pytest.mark.parametrize(("share", "pattern"), [(0.3, (0, 0)), (0.7, (0, 0)), (0.5, (2, 4)), (0.25, (1, 4))])
def test_the_sweep_is_the_loops(columns: int, share: float, pattern: tuple[int, int]) -> None:
    """Errors of a run reach the columns behind it only at its end, which comes to the same."""
    if pattern[1] and columns % pattern[1]:
        columns = pattern[1]
    x = inputs(24, seed=columns)
    x[:, 5] = 0.0
    weight, moment = drawn(6, 24, seed=9), x.T @ x
    got = pruned(weight, moment, share, pattern, columns=columns)
    torch.testing.assert_close(got, literal(weight, moment, share, pattern, columns), rtol=1e-8, atol=1e-9)
    assert bool((got[:, 5] == 0).all())


def test_runs_are_whole_groups_of_a_pattern() -> None:
    """Runs of 10 columns would cut every third group of 4: they are 8 wide."""
    x, weight = inputs(24), drawn(6, 24, seed=9)
    got = pruned(weight, x.T @ x, 0.5, (2, 4), columns=10)
    assert (got.unflatten(1, (-1, 4)) == 0).sum(-1).unique().tolist() == [2]
    torch.testing.assert_close(got, pruned(weight, x.T @ x, 0.5, (2, 4), columns=8), rtol=0, atol=0)
    few = pruned(weight, x.T @ x, 0.5, (2, 4), columns=3)
    torch.testing.assert_close(few, pruned(weight, x.T @ x, 0.5, (2, 4), columns=4), rtol=0, atol=0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.floats(0.05, 0.95), st.sampled_from([5, 8, 20]))
def test_each_run_of_columns_has_its_share_of_zeros(seed: int, share: float, columns: int) -> None:
    x = inputs(20, seed=seed)
    got = pruned(drawn(7, 20, seed=seed + 5), x.T @ x, share, columns=columns)
    for run in got.split(columns, dim=1):
        assert int((run == 0).sum()) == int(run.numel() * share)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.floats(0.1, 1e3))
def test_isotropic_inputs_give_magnitude_without_an_update(seed: int, power: float) -> None:
    weight = drawn(5, 16, seed=seed)
    got = pruned(weight, power * torch.eye(16, dtype=torch.float64), 0.5, columns=8)
    for start in (0, 8):
        part = weight[:, start : start + 8]
        edge = part.abs().flatten().sort().values[19]
        torch.testing.assert_close(
            got[:, start : start + 8], part.masked_fill(part.abs() <= edge, 0.0), rtol=1e-9, atol=1e-12
        )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.floats(1e-6, 1e6))
def test_the_scale_of_the_inputs_does_not_matter(seed: int, scale: float) -> None:
    x, weight = inputs(12, seed=seed), drawn(4, 12, seed=seed + 5)
    x[:, 3] = 0.0
    torch.testing.assert_close(pruned(weight, x.T @ x), pruned(weight, scale * x.T @ x), rtol=1e-6, atol=1e-8)


def test_the_root_is_that_of_the_damped_inverse() -> None:
    x = inputs(10)
    u = root_of_inverse(x.T @ x, DAMPING)
    assert torch.equal(u, u.triu())
    torch.testing.assert_close(u.T @ u, torch.linalg.inv(hessian(x.T @ x)), rtol=1e-9, atol=1e-12)
    nothing = root_of_inverse(torch.zeros(3, 3, dtype=torch.float64), DAMPING)
    torch.testing.assert_close(nothing, torch.eye(3, dtype=torch.float64) / (1 + DAMPING) ** 0.5)


class Chosen(Given):
    """A map whose mask is fixed beforehand."""

    mask: Tensor

    def lowest(self, scores: Tensor, *, rows: bool) -> Tensor:
        return self.mask


def swept(weight: Tensor, moment: Tensor, mask: Tensor) -> Tensor:
    given = Chosen(site="a", weight=weight, share=0.5)
    object.__setattr__(given, "mask", mask)
    return sweep(weight, root_of_inverse(moment, DAMPING), given, weight.shape[1])


def test_pruning_the_first_input_alone_is_optimal_brain_surgery() -> None:
    """δ = -w_0 / [H⁻¹]_00 · [H⁻¹]_0; for a later input j the same with H restricted to the inputs from j on."""
    x, weight = inputs(10), drawn(3, 10, seed=4)
    for j in (0, 4, 9):
        mask = torch.zeros(3, 10, dtype=torch.bool)
        mask[:, j] = True
        inverse = torch.linalg.inv(hessian(x.T @ x)[j:, j:])
        wanted = weight.clone()
        wanted[:, j:] -= weight[:, j : j + 1] / inverse[0, 0] * inverse[0]
        torch.testing.assert_close(swept(weight, x.T @ x, mask), wanted, rtol=1e-8, atol=1e-9)
        best = weight.clone()
        for i in range(3):
            behind = x[:, j + 1 :]
            level = DAMPING * (x.T @ x).diagonal().mean()
            ridge = behind.T @ behind + level * torch.eye(9 - j, dtype=torch.float64)
            best[i, j] = 0
            best[i, j + 1 :] += torch.linalg.solve(ridge, behind.T @ x[:, j] * weight[i, j]) if j < 9 else 0
        torch.testing.assert_close(wanted, best, rtol=1e-7, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.floats(0.1, 0.9))
def test_what_the_rows_lose_is_the_sum_of_their_errors(seed: int, share: float) -> None:
    """½ tr(δ H δᵀ) = Σ (w_j / U_jj)² / 2 over what was zeroed, with δ = E U and H = (Uᵀ U)⁻¹."""
    x, weight = inputs(12, seed=seed), drawn(4, 12, seed=seed + 5)
    u = root_of_inverse(x.T @ x, DAMPING)
    change = weight - pruned(weight, x.T @ x, share)
    errors = change @ torch.linalg.inv(u)
    kept = pruned(weight, x.T @ x, share) != 0
    assert float(errors[kept].abs().max()) < 1e-8 * float(errors.abs().max())
    loss = torch.trace(change @ hessian(x.T @ x) @ change.T) / 2
    assert float(errors.square().sum() / 2) == pytest.approx(float(loss), rel=1e-8)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_better_than_zeros_alone_and_no_better_than_least_squares(share: float) -> None:
    """With the same mask, over twenty maps; a single row may come off worse, since the sweep never looks back."""
    ours = bare = best = 0.0
    for seed in range(20):
        x, weight = inputs(24, seed=7 * seed), drawn(8, 24, seed=seed)
        h = hessian(x.T @ x)
        got = pruned(weight, x.T @ x, share)
        gone = got == 0

        def lost(other: Tensor, weight: Tensor = weight, h: Tensor = h) -> float:
            return float(torch.trace((weight - other) @ h @ (weight - other).T))

        fitted = weight.masked_fill(gone, 0.0)
        for i, out in enumerate(gone):
            fitted[i, ~out] = torch.linalg.solve(h[~out][:, ~out], h[~out] @ weight[i])
        ours, bare, best = ours + lost(got), bare + lost(weight.masked_fill(gone, 0.0)), best + lost(fitted)
        assert lost(got) >= lost(fitted) * (1 - 1e-9)
    assert best < ours < 0.9 * bare


@torch.no_grad()
def caught(model: nn.Module, paths: list[str], ids: Tensor) -> dict[str, Tensor]:
    """What enters maps [tokens, inputs], float64."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(p).register_forward_pre_hook(lambda _, a, p=p: seen.update({p: a[0].flatten(0, -2)}))
        for p in paths
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return {p: x.double() for p, x in seen.items()}


def stored(module: Any) -> Tensor:
    return module.weight if isinstance(module, nn.Linear) else module.weight.T


def same(got: Tensor, wanted: Tensor, site: str) -> None:
    """But for near ties of scores, and what their weights then do to those behind them."""
    off = (got.detach().double() - wanted).abs()
    assert float((off > 2e-3).double().mean()) < 0.01, site
    assert float(off.median()) < 1e-4, site


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("in_turn", [False, True])
def test_on_a_model(name: str, in_turn: bool) -> None:
    """All maps of two blocks, by the dense inputs or by those behind the pruned block."""
    model, literally, ids = tiny(name), tiny(name), text(24, 16)
    lab = Lab(model, ids, batch_size=8)
    found = {b: {s.id: s.path for s in lab.anatomy.linears(b)} for b in ("block.0", "block.2")}
    dense = caught(literally, [p for maps in found.values() for p in maps.values()], ids)
    wanted = {}
    for maps in found.values():
        seen = caught(literally, list(maps.values()), ids) if in_turn else dense
        for site, path in maps.items():
            held = stored(literally.get_submodule(path))
            moment = seen[path].T @ seen[path]
            wanted[site] = literal(held.detach().double(), moment, 0.5, (0, 0), 128)
            with torch.no_grad():
                held.copy_(wanted[site])
    step = Step(rewrite="sparsegpt", sites=tuple(wanted), options={"sparsity": 0.5})
    receipt = REWRITES.make("sparsegpt", {"in_turn": in_turn}).apply(step, lab)
    for site, weight in wanted.items():
        same(lab.anatomy.weight(site), weight, site)
        assert receipt.options["zeros"][site] == pytest.approx(0.5, abs=1e-9)
    assert lab.passes == 1  # in turn: block 0 twice, blocks 1 and 2 once, of 4


@pytest.mark.parametrize(
    ("options", "words"), [({"columns": 0}, "columns is at least 1"), ({"damping": -1.0}, "damping is above 0")]
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        REWRITES.make("sparsegpt", options)
