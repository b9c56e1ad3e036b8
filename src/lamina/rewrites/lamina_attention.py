"""Attention that sees a window, or that is linear, in the place of a block's own: with torch and transformers alone.

This file travels with the weights beside `modeling_lamina.py`. It stands in by transformers' own table of attention
functions, behind all that a model does to its queries and keys, and knows no architecture.
"""

import copy
import sys

import torch

NAME = "lamina_attention"
"""In transformers' table, and of the settings in a module's config."""
ROWS = 128
"""Queries that are computed at once have at least this number."""
FEATURES = {
    "elu": lambda x: torch.nn.functional.elu(x) + 1,
    "relu": torch.nn.functional.relu,
}
"""What linear attention takes of queries and keys: none is negative."""


def attend(model, step):
    """Give attention modules other settings: path → `window` and `sinks`, or `feature` of a linear attention."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    for path, told in step["modules"].items():
        module = model.get_submodule(path)
        before = getattr(module.config, NAME, None) or {"stock": module.config._attn_implementation}
        module.config = copy.copy(module.config)
        setattr(module.config, NAME, {**before, **told})
        module.config._attn_implementation_internal = NAME


def attention(module, query, key, value, attention_mask, scaling=None, position_bias=None, **kwargs):
    """The module's attention by its settings: queries [batch, heads, tokens, size], keys and values [batch, groups, …].

    Gives [batch, tokens, heads, size], and weights where the stock function does.
    """
    told = getattr(module.config, NAME)
    window, feature, count = told.get("window", 0), FEATURES.get(told.get("feature")), key.shape[2]
    bias = {} if position_bias is None else {"position_bias": position_bias}

    def stock(q, k, v, mask):
        return _stock(told["stock"], module)(module, q, k, v, mask, scaling=scaling, **bias, **kwargs)

    def linear(q, k, v, mask):
        return by_features(q, k, v, mask, feature, scaling), None

    narrow = 0 < window < count
    if not feature and not narrow:
        return stock(query, key, value, attention_mask)
    if bias:
        raise ValueError("attention with a bias by position has no window and no linear form here")
    mask = _padding(attention_mask, query) if getattr(attention_mask, "ndim", 4) == 2 else attention_mask
    if feature and mask is None and not narrow and query.shape[2] == count:
        return by_states(query, key, value, feature, scaling), None
    whole = told["stock"] == "eager" and not feature
    mask = mask if mask is None else mask[..., :count]
    return in_turn(linear if feature else stock, query, key, value, mask, window or count, told.get("sinks", 0), whole)


def _stock(name, module):
    """The attention function that the module would call; sdpa where a kernel would take no mask."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS["sdpa"]


def in_turn(core, query, key, value, mask, window, sinks, whole=False):
    """Some queries after the other, each run on the keys that any of them sees: the last `window` up to their own
    place, and the first `sinks` of their row. `whole`: all at once, and masks are added.
    """
    tokens, count = query.shape[2], key.shape[2]
    seen = _seen(mask)
    own = _own(seen, tokens, count, query.device)
    first = torch.zeros_like(own) if seen is None else seen.to(torch.uint8).argmax(-1)
    run, outs, weights = (tokens if whole else max(window, ROWS)), [], None
    for start in range(0, tokens, run):
        rows = slice(start, start + run)
        low = 0 if whole else max(int(own[..., rows].min()) - window + 1, 0)
        high = count if whole else int(own[..., rows].max()) + 1
        lead = min(low, int(first[..., rows].max()) + sinks) if sinks else 0
        places = _cut(torch.arange(count, device=query.device), 0, lead, low, high)
        back = own[..., rows].unsqueeze(-1) - places
        near = (back >= 0) & ((back < window) | (places < first[..., rows].unsqueeze(-1) + sinks))
        part = near if mask is None else _narrowed(_cut(mask[..., rows, :], -1, lead, low, high), near)
        if whole and part.dtype == torch.bool:
            part = torch.zeros_like(part, dtype=query.dtype).masked_fill(~part, torch.finfo(query.dtype).min)
        some = (_cut(x, 2, lead, low, high) for x in (key, value))
        out, weights = core(query[:, :, rows], *some, part)
        outs.append(out)
    return torch.cat(outs, 1), weights if whole else None


def _cut(x, dim, lead, low, high):
    """The first `lead` places along a dimension, and those from `low` to `high`."""
    part = x.narrow(dim, low, high - low)
    return torch.cat([x.narrow(dim, 0, lead), part], dim) if lead else part


def _seen(mask):
    """Which keys [batch, heads, tokens, keys] a mask lets queries see; None for no mask."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise ValueError(f"a mask of {mask.dtype} is not understood; load with attn_implementation='sdpa'")
    return mask > torch.finfo(mask.dtype).min / 2


def _own(seen, tokens, count, device):
    """The place among the keys of each query's own token [batch, heads, tokens]: the last that it sees.

    Without a mask, one query is the last token, and several are the first ones.
    """
    if seen is None:
        return torch.arange(tokens, device=device)[None, None] + (count - 1 if tokens == 1 else 0)
    return (seen * torch.arange(count, device=device)).amax(-1)


def _padding(mask, query):
    """A mask of keys [batch, keys] as one of queries too: the last query stands at the last key."""
    tokens, count = query.shape[2], mask.shape[1]
    own = torch.arange(count - tokens, count, device=mask.device)
    causal = own.unsqueeze(-1) >= torch.arange(count, device=mask.device)
    return causal & mask.bool()[:, None, None]


def _narrowed(part, near):
    """A mask in which what is not near is not seen."""
    return part & near if part.dtype == torch.bool else part.masked_fill(~near, torch.finfo(part.dtype).min)


def by_features(query, key, value, mask, feature, scaling):
    """Linear attention over the keys that a mask lets each query see: Σ φ(q)·φ(k) v / Σ φ(q)·φ(k), [batch, tokens,
    heads, size]; 0 where nothing is seen.
    """
    q, k, v = _featured(query, key, value, feature, scaling)
    found = (q @ k.transpose(-1, -2)) * _seen(mask)
    out = (found @ v) / found.sum(-1, keepdim=True).clamp_min(torch.finfo(found.dtype).tiny)
    return out.transpose(1, 2).to(value.dtype)


def by_states(query, key, value, feature, scaling):
    """The same where each query sees all keys up to its own: runs of ROWS tokens, and of those before only sums."""
    q, k, v = _featured(query, key, value, feature, scaling)
    state, norm, outs = 0.0, 0.0, []
    for start in range(0, q.shape[2], ROWS):
        a, b, c = (x[:, :, start : start + ROWS] for x in (q, k, v))
        found = (a @ b.transpose(-1, -2)).tril()
        above, below = found @ c, found.sum(-1, keepdim=True)
        if start:
            above, below = above + a @ state, below + (a * norm).sum(-1, keepdim=True)
        outs.append(above / below.clamp_min(torch.finfo(below.dtype).tiny))
        if start + ROWS < q.shape[2]:
            state, norm = state + b.transpose(-1, -2) @ c, norm + b.sum(2, keepdim=True)
    return torch.cat(outs, 2).transpose(1, 2).to(value.dtype)


def _featured(query, key, value, feature, scaling):
    """Features of queries and keys, and values, float32, with a group's keys and values for each of its heads.

    Each gets the root of the scale of the stock logits.
    """
    root = (query.shape[-1] ** -0.5 if scaling is None else scaling) ** 0.5
    each = query.shape[1] // key.shape[1]
    k, v = (x.float().repeat_interleave(each, 1) for x in (key, value))
    return feature(query.float() * root), feature(k * root), v
