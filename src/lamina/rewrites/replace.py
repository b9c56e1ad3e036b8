"""Replace: an affine map in the place of a sublayer's core, fitted in closed form on what the network really sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lamina.core.documents import Receipt, Step
from lamina.core.papers import Card, Need, Paper
from lamina.core.registry import rewrite
from lamina.core.sites import SUBLAYERS, Cost
from lamina.rewrites.drop import Drop, Problem, stack_sites, structure

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lamina.anatomy import Anatomy
    from lamina.anatomy.parts import Block, Branch
    from lamina.lab import Lab

PAPER = Paper(
    key="chen2024streamline",
    title="Streamlining Redundant Layers to Compress Large Language Models",
    authors=("Xiaodong Chen", "Yuxuan Hu", "Jing Zhang", "Yanling Wang", "Cuiping Li", "Hong Chen"),
    year=2024,
    arxiv="2403.19135",
)
BY = ("linear", "low-rank", "constant")


@rewrite(
    "replace",
    PAPER,
    on=tuple(sorted(SUBLAYERS)),
    needs=Need.FORWARD,
    status="stable",
    deviations=(
        "an affine map behind the sublayer's own norm, in closed form; the paper trains a layer or an MLP by gradients",
        "fitted in depth order on the streams of the thinned network, the dense stream behind it as the target, rows "
        "weighted by 1/|target|²",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Replace:
    """Put x ↦ W x + b in the place of sublayers' cores: least Σ_t ‖y_t - x_t - s(W z_t + b)‖² / ‖y_t‖² by ridge.

    z is what the core reads, x the stream before it joins in the thinned network, y the dense stream behind it (behind
    the sites `options["around"]` too that follow it and are dropped by another step), s the branch's scale. `by`:
    "linear" W [width, width]; "low-rank": W of rank `rank`, the best for these inputs; "constant": b alone, norms gone
    too. Where a norm follows the core of a map, the target is what the core itself makes of z. An attention that is
    replaced holds no cache entry. One dense and one thinned pass over the text.
    """

    card: ClassVar[Card]

    by: str = "linear"
    rank: int = 32
    ridge: float = 0.01

    def __post_init__(self) -> None:
        if self.by not in BY:
            raise ValueError(f"by is one of {', '.join(BY)}, not {self.by!r}")
        if self.rank < 1:
            raise ValueError(f"rank is at least 1, not {self.rank}")
        if self.ridge <= 0:
            raise ValueError(f"ridge is above 0, not {self.ridge:g}")

    def check(self, step: Step, anatomy: Anatomy) -> list[Problem]:
        """What stands in the way; needs no weights."""
        known = {s.id for s in anatomy.sublayers}
        problems = [] if step.sites else [Problem("replace", "the step names no site")]
        problems += [Problem(s, "the model has no such sublayer") for s in step.sites if s not in known]
        for site in step.sites if not problems else ():
            branch, block = anatomy.branch(site), anatomy.block(site)
            if branch.joins or not block.plain or block.turns > 1 or branch.widths:
                problems.append(Problem(site, "what its core does to the stream is no plain addition", "drop it"))
            if self.by == "low-rank" and 2 * self.rank >= anatomy.stack(site).width:
                problems.append(Problem(site, f"rank {self.rank} saves nothing against a linear map", "by: linear"))
            if self._size(anatomy, site)[0] >= self._gone(anatomy, site).parameters:
                problems.append(Problem(site, "the map is as large as what it replaces", "by: low-rank or constant"))
        return problems or [p for p in Drop().check(Step(rewrite="drop", sites=step.sites), anatomy) if _stands(p)]

    def _size(self, anatomy: Anatomy, site: str) -> tuple[int, int]:
        """Parameters and products per token of the map."""
        width = anatomy.stack(site).width
        products = {"linear": width * width, "low-rank": 2 * self.rank * width, "constant": 0}[self.by]
        return products + width, products

    def _gone(self, anatomy: Anatomy, site: str) -> Cost:
        """What goes with the core: its own modules, and the norms before and behind it where a constant needs none."""
        branch, block, cost = anatomy.branch(site), anatomy.block(site), anatomy.cost(site)
        if self.by == "constant":
            return cost
        module = anatomy.model.get_submodule(block.path).get_submodule(branch.core)
        held = {id(p): p for p in module.parameters()}.values()
        sizes = sum(p.numel() for p in held), sum(p.numel() * p.element_size() for p in held)
        return Cost(*sizes, cost.macs, cost.kv_bytes)

    def _described(self, anatomy: Anatomy, site: str) -> dict[str, Any]:
        width = anatomy.stack(site).width
        kinds = {"linear": "linear", "low-rank": "factors", "constant": "constant"}
        more = {"rank": self.rank} if self.by == "low-rank" else {}
        bias = {} if self.by == "constant" else {"bias": True}
        return {"type": kinds[self.by], "inputs": width, "outputs": width, **more, **bias}

    def forecast(self, step: Step, anatomy: Anatomy) -> Cost:
        """What the whole model will take; equals the receipt's `after`."""
        total = anatomy.total()
        for site in step.sites:
            gone, (size, products) = self._gone(anatomy, site), self._size(anatomy, site)
            each = next(anatomy.model.get_submodule(anatomy.site(site).path).parameters()).element_size()
            total = total - gone + Cost(size, size * each, products)
        return total

    def apply(self, step: Step, lab: Lab) -> Receipt:
        """Fit the maps and put them in. Raises UnsupportedError for the first problem, before anything is changed."""
        for problem in self.check(step, lab.anatomy):
            raise problem.error()
        anatomy = lab.anatomy
        before, after = anatomy.total(), self.forecast(step, anatomy)
        maps = {s: self._described(anatomy, s) for s in step.sites}
        around = anatomy.expand(step.options.get("around", ()))
        fits: dict[str, tuple[Tensor, Tensor]] = {}
        for place in range(len(anatomy.stacks)):
            fits |= _fitted(lab, place, frozenset(step.sites), around, self)
        gone = frozenset(step.sites)
        steps = [structure(anatomy, k, gone, maps) for k in anatomy.stacks if stack_sites(anatomy, k, gone)]
        modules = {s: anatomy.model.get_submodule(anatomy.block(s).path) for s in step.sites}
        cores = {s: anatomy.branch(s).core for s in step.sites}
        receipt = Receipt(
            rewrite=self.card.name, sites=step.sites, before=before, after=after, options=step.options,
            structure={"steps": steps},
        )  # fmt: skip
        self.replay(receipt, lab.model)
        for site, (weight, bias) in fits.items():
            _fill(modules[site].get_submodule(cores[site]).map, weight, bias)
        lab.renew()
        return receipt

    def replay(self, receipt: Receipt, skeleton: nn.Module, anatomy: Anatomy | None = None) -> None:
        """Rebuild the structure on a model of the dense class, on any device, meta included."""
        from lamina.rewrites.structure import replay

        replay(skeleton, receipt.structure["steps"])

    @staticmethod
    def examples(anatomy: Anatomy) -> tuple[Step, ...]:
        """Steps that the conformance suite tries: one MLP; an attention and an MLP of one block, and layer 0's."""
        block = anatomy.stacks[0].blocks
        last = [b.branches[-1].site.id for b in block]
        sites = ((last[1],), (block[0].branches[0].site.id, last[2]), tuple(x.site.id for x in block[2].branches))
        steps = [Step(rewrite="replace", sites=s) for s in sites]
        return tuple(s for s in steps if not Replace().check(s, anatomy))


def _stands(problem: Problem) -> bool:
    """Whether a problem of dropping is one of replacing too: a stack of maps alone is still a stack."""
    return problem.what != "nothing would be left of the stack"


@contextmanager
def _noted(core: nn.Module, branch: Branch) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Inside, what the core reads and what it gives are noted, call by call."""
    from torch.utils._pytree import tree_leaves

    read: list[Tensor] = []
    given: list[Tensor] = []

    def note(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        read.append(args[branch.stream] if isinstance(branch.stream, int) else kwargs[branch.stream])
        given.append(tree_leaves(out)[0])

    handle = core.register_forward_hook(note, with_kwargs=True)
    try:
        yield read, given
    finally:
        handle.remove()


def _fitted(
    lab: Lab, place: int, sites: frozenset[str], around: frozenset[str], how: Replace
) -> dict[str, tuple[Tensor, Tensor]]:
    """Site → W [width, width] or (rank, …) and b [width], in depth order, each on the streams that the others leave."""
    from lamina.anatomy.trial import forward_of, wrapped
    from lamina.lab.walk import Walk
    from lamina.rewrites.refit import _gap, _Targets

    stack = lab.anatomy.stacks[place]
    mine = [n for n, b in enumerate(stack.blocks) for x in b.branches if x.site.id in sites | around]
    if not any(x.site.id in sites for b in stack.blocks for x in b.branches):
        return {}
    thin, dense = Walk(lab, around - sites, place), _Targets(lab, place)
    thin.streams, thin.at = dense.entering(min(mine)), min(mine)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with ExitStack() as held:
        for number, block in enumerate(stack.blocks[: max(mine) + 1]):
            if number < min(mine):
                continue
            dense.forget(number)
            for position, branch in enumerate(block.branches):
                if branch.site.id not in sites:
                    continue
                core = lab.model.get_submodule(f"{block.path}.{branch.core}")
                behind = None if not branch.tail and how.by != "constant" else _gap(stack, around, number, position)
                z, x, y = _seen(lab, thin, dense, block, position, behind)
                weight, bias = _solved(lab, how, z, x, y)
                found[branch.site.id] = weight / branch.scale, bias / branch.scale

                def mapped(
                    *args: Any, held: Any = (weight / branch.scale, bias / branch.scale), to: Any = branch, **kw: Any
                ) -> Any:
                    tokens = args[to.stream] if isinstance(to.stream, int) else kw[to.stream]
                    made = tokens.float() @ held[0].T.to(tokens.device) + held[1].to(tokens.device)
                    return wrapped(made.to(tokens.dtype), to.returns)

                held.enter_context(forward_of(core, mapped))
                lab.progress("maps", len(found), len(sites))
            thin.step()
    return found


def _seen(
    lab: Lab, thin: Any, dense: Any, block: Block, position: int, behind: tuple[int, int] | None
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Per batch z, x and y: what the core reads, the stream that it joins, and the dense stream behind it.

    Where `behind` is None x is zero and y what the core itself makes of z.
    """
    branch = block.branches[position]
    core = lab.model.get_submodule(f"{block.path}.{branch.core}")
    later = [b.site.id for b in block.branches[position + 1 :]]
    with _noted(core, branch) as (read, given):
        thin.look(branch, later)
    if behind is None:
        return list(read), [g * 0 for g in given], list(given)
    streams, _ = thin.look(branch, [branch.site.id, *later])
    return list(read), streams, dense.after(*behind)


def _solved(
    lab: Lab, how: Replace, z: Sequence[Tensor], x: Sequence[Tensor], y: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """W and b, float32."""
    import torch

    from lamina.lab.lab import real
    from lamina.rewrites.factorise import factors_of

    gram: Any = 0.0
    moment: Any = 0.0
    for zb, xb, yb, batch in zip(z, x, y, lab.batches, strict=True):
        keep = real(batch).to(zb.device)
        zf, xf, yf = (t[keep].double() for t in (zb, xb, yb))
        zf = torch.cat([zf, torch.ones_like(zf[:, :1])], 1) if how.by != "constant" else torch.ones_like(zf[:, :1])
        weight = 1 / yf.square().sum(1, keepdim=True).clamp_min(1e-12)
        gram = gram + zf.T @ (zf * weight)
        moment = moment + zf.T @ ((yf - xf) * weight)
    level = torch.full((len(gram),), float(how.ridge * gram.diagonal()[:-1].mean()) if len(gram) > 1 else 0.0)
    level[-1] = 1e-9 * float(gram[-1, -1])  # the bias is free
    gram = gram + torch.diag(level.double().clamp_min(1e-30))
    made = torch.linalg.solve(gram, moment)
    weight, bias = made[:-1].T, made[-1]
    if how.by == "constant":
        return torch.zeros(len(bias), len(bias)), bias.float()
    if how.by == "low-rank":
        inner = gram[:-1, :-1]
        values, vectors = torch.linalg.eigh(inner)
        roots = values.clamp_min(1e-12 * values[-1]).sqrt()
        scale = (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
        first, second = factors_of(weight, how.rank, scale)
        weight = second @ first
    return weight.float(), bias.float()


def _fill(module: Any, weight: Tensor, bias: Tensor) -> None:
    """Write a map into what stands for it."""
    import torch

    from lamina.rewrites.factorise import factors_of

    with torch.no_grad():
        if hasattr(module, "up"):
            first, second = factors_of(weight.double(), module.down.out_features)
            module.down.weight.copy_(first)
            module.up.weight.copy_(second)
            module.up.bias.copy_(bias)
            return
        if hasattr(module, "weight"):
            module.weight.copy_(weight)
        module.bias.copy_(bias)
