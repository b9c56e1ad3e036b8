"""The published formulas written out on transformers' own outputs and hand-placed hooks.

Slow, and without lamina's anatomy.
All arithmetic on what the model returned is float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Places(NamedTuple):
    """Where a family keeps its blocks and, within a block, the two branches, their projections and the MLP's norm."""

    blocks: str
    attention: str
    mlp: str
    attention_out: str
    mlp_out: str
    mlp_norm: str
    attention_norm: str = "input_layernorm"
    parallel: bool = False


_LLAMA = Places("model.layers", "self_attn", "mlp", "self_attn.o_proj", "mlp.down_proj", "post_attention_layernorm")
PLACES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "granite": _LLAMA,
    "gpt2": Places("transformer.h", "attn", "mlp", "attn.c_proj", "mlp.c_proj", "ln_2", "ln_1"),
    "gpt_neox": Places(
        "gpt_neox.layers",
        "attention",
        "mlp",
        "attention.dense",
        "mlp.dense_4h_to_h",
        "post_attention_layernorm",
        parallel=True,
    ),
    "mixtral": _LLAMA._replace(mlp_out="mlp"),
    "gemma2": _LLAMA._replace(mlp_norm="pre_feedforward_layernorm"),
}
"""What is masked of Mixtral's experts is their sum, as in the papers' code."""
MLP_NAME = {"mixtral": "moe"}


def layers(model: nn.Module, name: str) -> list[Any]:
    return list(model.get_submodule(PLACES[name].blocks))  # type: ignore[arg-type]


def first(value: Any) -> Tensor:
    while not isinstance(value, Tensor):
        value = value[0]
    return value


def taken(args: Any, kwargs: Any) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


@torch.no_grad()
def pairs(model: nn.Module, name: str, ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """(stream before, stream after) of every block and sublayer, float64 [sequences, tokens, width], by site id.

    A serial block's stream is what its norms receive and what it returns; branches of a parallel one are added here.
    """
    places, seen, handles = PLACES[name], {}, []
    mlp_name = MLP_NAME.get(name, "mlp")

    def note(key: str, where: str) -> Any:
        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            seen[where, key] = (taken(args, kwargs).double().clone(), first(output).double().clone())

        return hook

    for n, block in enumerate(layers(model, name)):
        watched = {
            "block": block,
            "attention": block.get_submodule(places.attention),
            "mlp": block.get_submodule(places.mlp),
            "attention norm": block.get_submodule(places.attention_norm),
            "mlp norm": block.get_submodule(places.mlp_norm),
        }
        handles += [m.register_forward_hook(note(k, f"block.{n}"), with_kwargs=True) for k, m in watched.items()]
    try:
        model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for n in range(len(layers(model, name))):
        at = f"block.{n}"
        x, y = found[at] = seen[at, "block"]
        if places.parallel:
            found[f"{at}.attention"] = (x, x + seen[at, "attention"][1])
            found[f"{at}.{mlp_name}"] = (x, x + seen[at, "mlp"][1])
        else:
            middle = seen[at, "mlp norm"][0]
            found[f"{at}.attention"] = (seen[at, "attention norm"][0], middle)
            found[f"{at}.{mlp_name}"] = (middle, y)
    return found


def similarities(model: nn.Module, name: str, ids: Tensor) -> dict[str, float]:
    """LLM-Drop, eq. 1-2: the mean over tokens of cos(x, y), token by token in a loop."""
    found = {}
    for site, (x, y) in pairs(model, name, ids).items():
        cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True)]
        found[site] = math.fsum(cosines) / len(cosines)
    return found


def projection(model: nn.Module, name: str, site: str) -> Any:
    """The last map of a sublayer."""
    _, number, part = site.split(".")
    places = PLACES[name]
    return layers(model, name)[int(number)].get_submodule(
        places.attention_out if part == "attention" else places.mlp_out
    )


def parts(name: str, site: str) -> list[str]:
    return [site] if site.count(".") == 2 else [f"{site}.attention", f"{site}.{MLP_NAME.get(name, 'mlp')}"]


def zeroed(model: nn.Module, name: str, sites: Iterable[str]) -> nn.Module:
    """A copy with all-zero output projections of these sites."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for site in sites:
            for part in parts(name, site):
                for parameter in projection(twin, name, part).parameters():
                    parameter.zero_()
    return twin


@contextmanager
def masked(model: nn.Module, name: str, sites: Iterable[str]) -> Iterator[None]:
    """Inside, the outputs of these projections are multiplied by an all-zero mask, as FinerCut's code does it."""

    def mask(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    with ExitStack() as held:
        for site in sites:
            for part in parts(name, site):
                handle = projection(model, name, part).register_forward_hook(mask)
                held.callback(handle.remove)
        yield


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


@torch.no_grad()
def loss(model: nn.Module, ids: Tensor) -> float:
    """The mean next-token loss as transformers computes it."""
    return float(model(ids, labels=ids, use_cache=False).loss.double())


def divergence(metric: str, reference: Tensor, changed: Tensor) -> float:
    """The mean over tokens, in nats, from the definitions: probabilities, logarithms of ratios, sums."""
    p, q = reference.double().softmax(-1), changed.double().softmax(-1)
    m = (p + q) / 2
    per_token = {
        "kl": lambda: p * (p / q).log(),
        "js": lambda: 0.5 * (p * (p / m).log() + q * (q / m).log()),
        "js-reversed": lambda: 0.5 * (m * (m / p).log() + m * (m / q).log()),
    }[metric]()
    return float(per_token.sum(-1).mean())


def greedy(
    model: nn.Module, name: str, ids: Tensor, count: int, metric: str = "js-reversed", early: float = 0.0
) -> tuple[list[tuple[str, float]], int]:
    """FinerCut's double loop: all candidates at every step, all sequences; the picks and the forwards that it ran."""
    depth = len(layers(model, name))
    sites = [p for n in range(depth) for p in parts(name, f"block.{n}")]
    attentions = {s for s in sites if s.endswith("attention")}
    protected = (
        {p for n in range(int(2 * depth * early / 2) + 1) for p in parts(name, f"block.{n}")} if early else set()
    )
    until = int(2 * depth * early) + 1
    reference, gone, picks, forwards = logits(model, ids), [], [], 1
    for _ in range(count):
        values = {}
        for site in sites:
            shielded = site in protected and len(gone) < until
            last = attentions <= {*gone, site} or len(gone) + 1 == len(sites)
            if site not in gone and not shielded and not last:
                with masked(model, name, [*gone, site]):
                    values[site] = divergence(metric, reference, logits(model, ids))
                forwards += 1
        best = min(values, key=lambda s: values[s])
        gone.append(best)
        picks.append((best, values[best]))
    return picks, forwards


def angles(model: nn.Module, name: str, ids: Tensor) -> list[list[float]]:
    """Deeper Layers, eq. 5: d[l][n] = mean over sequences of arccos(cos(h_l[T], h_{l+n}[T]))/π, n = 0 … L-l."""
    found = pairs(model, name, ids)
    depth = len(layers(model, name))
    states = [found["block.0"][0], *(found[f"block.{n}"][1] for n in range(depth))]

    def distance(a: Tensor, b: Tensor) -> float:
        cosines = [float(x[-1] @ y[-1] / (x[-1].norm() * y[-1].norm())) for x, y in zip(a, b, strict=True)]
        return math.fsum(math.acos(max(-1.0, min(1.0, c))) / math.pi for c in cosines) / len(cosines)

    return [[distance(states[i], states[j]) for j in range(i, depth + 1)] for i in range(depth)]
