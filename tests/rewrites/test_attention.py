"""Windows: what each attention sees, token by token, against masks that are written out in loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, StaticCache

from lamina.core.documents import Step
from lamina.core.errors import LaminaError
from lamina.core.registry import REWRITES
from lamina.exporters.hf import form, save_checkpoint
from lamina.lab import Lab
from lamina.rewrites import lamina_attention
from lamina.rewrites.attention import core_of
from lamina.testing.models import padded, text, tiny

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
ATTENTIONS = tuple(f"block.{n}.attention" for n in range(4))


def windowed(model: nn.Module, window: Any, sinks: Any = 0, sites: tuple[str, ...] = ATTENTIONS) -> Any:
    """The model with windows, by the rewrite; the same model."""
    options = {"window": window} | ({"sinks": sinks} if sinks else {})
    lab = Lab(model, text(1, 8))
    REWRITES.make("window").apply(Step(rewrite="window", sites=sites, options=options), lab)
    return lab.model


def literal(model: Any, seen: dict[str, tuple[int, int]], ids: Tensor, kept: Tensor | None = None) -> Tensor:
    """Logits of a dense, eager model whose attentions get masks made number by number: site → window and sinks."""
    assert model.config._attn_implementation == "eager"
    lab = Lab(model, text(1, 8))
    kept = torch.ones_like(ids) if kept is None else kept
    handles = []
    for site, (window, sinks) in seen.items():
        mask = torch.full((*ids.shape, ids.shape[1]), torch.finfo(torch.float32).min)
        for row in range(len(ids)):
            first = int(kept[row].argmax())
            for t in range(ids.shape[1]):
                for s in range(first, t + 1):
                    if t - s < window or s - first < sinks:
                        mask[row, t, s] = 0.0
        own = mask.unsqueeze(1)
        hook = lambda _, a, k, own=own: (a, {**k, "attention_mask": own})  # noqa: E731
        handles.append(core_of(lab.anatomy, site)[1].register_forward_pre_hook(hook, with_kwargs=True))
    with torch.no_grad():
        found = model(ids, attention_mask=kept, use_cache=False, position_ids=(kept.cumsum(1) - 1).clamp_min(0)).logits
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def logits(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    return model(ids, use_cache=False, **inputs).logits


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi", "qwen3", "olmo2", "mixtral", "granite", "cohere"])
def test_an_attention_sees_its_window_and_the_first_tokens(name: str, kind: str) -> None:
    ids = text(2, 20)
    seen = {ATTENTIONS[0]: (3, 0), ATTENTIONS[2]: (5, 2), ATTENTIONS[3]: (1, 4)}
    want = literal(tiny(name, attn_implementation="eager"), seen, ids)
    windows, sinks = {s: w for s, (w, _) in seen.items()}, {s: n for s, (_, n) in seen.items()}
    model = windowed(tiny(name, attn_implementation=kind), windows, sinks, tuple(seen))
    torch.testing.assert_close(logits(model, ids), want, **CLOSE)
    assert (logits(tiny(name), ids) - want).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_a_window_within_a_window(kind: str) -> None:
    ids, seen = text(2, 16), dict.fromkeys(ATTENTIONS, (3, 0))
    want = literal(tiny("mistral", attn_implementation="eager"), seen, ids)
    model = windowed(tiny("mistral", attn_implementation=kind), 3)
    torch.testing.assert_close(logits(model, ids), want, **CLOSE)


def test_a_capped_attention_keeps_its_cap() -> None:
    ids, seen = text(2, 16), {ATTENTIONS[1]: (4, 1), ATTENTIONS[3]: (2, 0)}
    want = literal(tiny("gemma2", attn_implementation="eager"), seen, ids)
    windows, sinks = {s: w for s, (w, _) in seen.items()}, {s: n for s, (_, n) in seen.items()}
    model = windowed(tiny("gemma2", attn_implementation="eager"), windows, sinks, tuple(seen))
    torch.testing.assert_close(logits(model, ids), want, **CLOSE)


@pytest.mark.parametrize("sinks", [0, 3])
def test_long_texts_are_run_some_queries_at_a_time(sinks: int) -> None:
    ids, seen = text(1, 2 * lamina_attention.ROWS + 30), dict.fromkeys(ATTENTIONS, (7, sinks))
    want = literal(tiny("llama", attn_implementation="eager"), seen, ids)
    torch.testing.assert_close(logits(windowed(tiny("llama"), 7, sinks), ids), want, **CLOSE)


def test_padded_rows_of_long_texts_have_sinks_of_their_own() -> None:
    rows = [text(1, n, seed=n)[0] for n in (150, 9, 140)]
    (batch,) = padded(rows, 3, side="left")
    model = windowed(tiny("llama"), 4, 2)
    dense = tiny("llama", attn_implementation="eager")
    want = literal(dense, dict.fromkeys(ATTENTIONS, (4, 2)), batch["input_ids"], batch["attention_mask"])
    got = logits(model, batch.pop("input_ids"), **batch)
    keep = batch["attention_mask"].bool()
    torch.testing.assert_close(got[keep], want[keep], **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral"])
def test_a_window_as_long_as_the_text_changes_no_bit(name: str) -> None:
    ids, window = text(2, 12), {"mistral": 5, "gemma2": 5}.get(name, 12)
    sites = ATTENTIONS[:2] if window == 12 else ATTENTIONS
    ids = ids[:, :window]
    dense, model = tiny(name), windowed(tiny(name), window, sites=sites)
    assert torch.equal(logits(model, ids), logits(dense, ids))
    assert (logits(windowed(tiny(name), window - 1, sites=sites), ids) - logits(dense, ids)).abs().max() > 1e-3


@torch.no_grad()
def test_it_is_the_stock_window_of_models_that_have_one() -> None:
    ids = text(3, 20)
    pairs = [
        (tiny("mistral", sliding_window=None), tiny("mistral", sliding_window=6), 6, ATTENTIONS),
        (
            tiny("qwen2"),
            tiny("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=2),
            4,
            ATTENTIONS[2:],
        ),
        (tiny("mixtral"), tiny("mixtral", sliding_window=5), 5, ATTENTIONS),
    ]
    for dense, stock, window, sites in pairs:
        assert (logits(dense, ids) - logits(stock, ids)).abs().max() > 1e-3
        model: Any = windowed(dense, window, sites=sites)
        torch.testing.assert_close(logits(model, ids), logits(stock, ids), **CLOSE)
        told = {"max_new_tokens": 12, "do_sample": False}
        assert torch.equal(model.generate(ids, **told), stock.generate(ids, **told))  # type: ignore[operator]


@torch.no_grad()
@pytest.mark.parametrize("sinks", [0, 2])
def test_chunks_and_a_static_cache_give_the_full_forward(sinks: int) -> None:
    ids = text(2, 18)
    for name in ("llama", "gpt2"):
        model = windowed(tiny(name), 4, sinks)
        want = logits(model, ids)
        past = model(ids[:, :7], use_cache=True).past_key_values
        rest = model(ids[:, 7:13], past_key_values=past, use_cache=True).logits
        torch.testing.assert_close(rest, want[:, 7:13], **CLOSE)
        fixed = StaticCache(config=model.config, max_cache_len=24)
        parts = [model(part, past_key_values=fixed, use_cache=True).logits for part in ids.split([6, 1, 5, 6], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), want, **CLOSE)


@torch.no_grad()
def test_a_decoded_token_reads_its_window_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = windowed(tiny("llama"), 5, 2, ATTENTIONS[1:3]), text(1, 30)
    past = model(ids, use_cache=True).past_key_values
    read = []
    stock = nn.functional.scaled_dot_product_attention
    noted = lambda q, k, v, **o: read.append(k.shape[2]) or stock(q, k, v, **o)  # noqa: E731
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", noted)
    model(ids[:, :1], past_key_values=past, use_cache=True)
    assert read == [31, 7, 7, 31]


def test_a_mask_of_keys_alone_is_made_one_of_queries() -> None:
    model = windowed(tiny("llama"), 3, 1)
    module = model.model.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 8, generator=generator) for heads in (4, 2, 2))
    keep = torch.ones(2, 9, dtype=torch.long)
    keep[1, :3] = 0
    mask = torch.zeros(2, 1, 9, 9, dtype=torch.bool)
    for row in range(2):
        for t in range(9):
            for s in range(t + 1):
                mask[row, 0, t, s] = bool(keep[row, s])
    found, want = (lamina_attention.attention(module, q, k, v, m, scaling=0.3)[0] for m in (keep, mask))
    torch.testing.assert_close(found[keep.bool()], want[keep.bool()])
    with pytest.raises(ValueError, match="not understood"):
        lamina_attention.attention(module, q, k, v, mask.int())
    with pytest.raises(ValueError, match="bias by position"):
        lamina_attention.attention(module, q, k, v, mask, position_bias=torch.zeros(1, 4, 9, 9))


def test_a_later_step_says_more_and_leaves_the_rest() -> None:
    ids = text(2, 15)
    model = windowed(windowed(tiny("llama"), 6, 2), 3, sites=ATTENTIONS[:1])
    want = literal(
        tiny("llama", attn_implementation="eager"), {s: (3 if s == ATTENTIONS[0] else 6, 2) for s in ATTENTIONS}, ids
    )
    torch.testing.assert_close(logits(model, ids), want, **CLOSE)
    assert model.config._attn_implementation == "sdpa"


def test_the_checkpoint_has_the_windows(tmp_path: Path) -> None:
    lab, ids = Lab(tiny("llama"), text(1, 8)), text(2, 20)
    step = Step(rewrite="window", sites=ATTENTIONS[1:], options={"window": 4, "sinks": 1})
    receipt = REWRITES.make("window").apply(step, lab)
    assert form(lab.model, [receipt]) == "shim"
    save_checkpoint(lab.model, [receipt], None, tmp_path / "windows")
    for kind in ("sdpa", "eager"):
        again: Any = AutoModelForCausalLM.from_pretrained(
            tmp_path / "windows", trust_remote_code=True, attn_implementation=kind
        )
        torch.testing.assert_close(logits(again, ids), logits(lab.model, ids), **CLOSE)


def test_the_receipt_says_what_costs_do_not() -> None:
    lab = Lab(tiny("llama"), text(1, 8))
    sizes = {ATTENTIONS[0]: 6, ATTENTIONS[2]: 3}
    receipt = REWRITES.make("window").apply(
        Step(rewrite="window", sites=tuple(sizes), options={"window": sizes, "sinks": 2}), lab
    )
    assert receipt.before == receipt.after == lab.anatomy.total()
    (said,) = REWRITES.method("window").remarks(receipt)
    assert "2 attentions" in said
    assert "at most 5 to 8 tokens" in said
    assert "no memory is saved" in said


@pytest.mark.parametrize(
    ("name", "sites", "options", "said"),
    [
        ("llama", ATTENTIONS[:1], {}, "tells no window"),
        ("llama", ATTENTIONS[:1], {"window": 0}, "whole number of tokens from 1"),
        ("llama", ATTENTIONS[:1], {"window": 2.5}, "whole number"),
        ("llama", ATTENTIONS[:1], {"window": True}, "whole number"),
        ("llama", ATTENTIONS[:1], {"window": 3, "sinks": -1}, "whole number of tokens from 0"),
        ("llama", ATTENTIONS[:2], {"window": {ATTENTIONS[0]: 3}}, "not None"),
        ("llama", ATTENTIONS[:1], {"window": 3, "sink": 1}, "no option 'sink'"),
        ("llama", ("block.1.mlp",), {"window": 3}, "no attention"),
        ("llama", ("block.1",), {"window": 3}, "no such sublayer"),
        ("llama", (), {"window": 3}, "names no site"),
        ("falcon", ATTENTIONS[:1], {"window": 3}, "not looked up"),
        ("nanogpt", ATTENTIONS[:1], {"window": 3}, "not looked up"),
        ("mistral", ATTENTIONS[:1], {"window": 6}, "sees 6 tokens as it is"),
        ("mistral", ATTENTIONS[:1], {"window": 3, "sinks": 1}, "hides the first tokens"),
    ],
)
def test_what_cannot_be_done_is_told(name: str, sites: tuple[str, ...], options: dict[str, Any], said: str) -> None:
    lab = Lab(tiny(name), text(2, 8))
    with pytest.raises(LaminaError, match=said):
        REWRITES.make("window").apply(Step(rewrite="window", sites=sites, options=options), lab)
