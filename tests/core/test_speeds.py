"""speed.json: verdicts, evidence, and files of the first format stay readable."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from lamina.core.documents import Evidence
from lamina.core.errors import InputError
from lamina.core.speeds import NO_GAIN, Held, SpeedFile, SpeedRow, Spread, no_gain, no_gains

FIRST = """
{"lamina": 1, "of": "sha256:00", "machine": {"processor": "x", "cores": 2, "threads": 1, "load": 0.3},
 "rows": [{"engine": "transformers", "what": "decode", "batch": 1, "length": 128, "tokens": 32,
           "dense": {"value": 10.0, "low": 9.0, "high": 11.0}, "thinned": {"value": 12.0},
           "ratio": {"value": 1.2, "low": 1.1, "high": 1.3}, "dense_rounds": [3.2, 3.3], "thinned_rounds": [2.7, 2.6]}],
 "batch": 1, "length": 128,
 "parts": [{"of": "dense", "kind": "mlp", "like": "block.0.mlp", "shape": "4×8", "count": 3, "parameters": 64,
            "prefill": 0.001, "prefill_share": 0.5, "decode": 0.0005, "decode_share": 0.4}],
 "held": [{"engine": "transformers", "of": "dense", "batch": 1, "length": 128, "weights": 1000, "kv": 10}],
 "notes": ["energy: not readable here: x"]}
"""
"""As the first version wrote it: it must be read for as long as the format is 1."""


def row(**more: Any) -> SpeedRow:
    fixed: dict[str, Any] = {
        "engine": "transformers", "what": "prefill", "batch": 4, "length": 128, "tokens": 512,
        "dense": Spread(value=100.0, low=90.0, high=110.0), "thinned": Spread(value=130.0, low=120.0, high=140.0),
        "ratio": Spread(value=1.3, low=1.2, high=1.4), "dense_rounds": (1.0, 2.0), "thinned_rounds": (0.5, 1.0),
    }  # fmt: skip
    return SpeedRow(**{**fixed, **more})


@pytest.mark.parametrize(
    ("low", "high", "less", "reason"),
    [
        (1.01, 1.2, False, ""),
        (0.99, 1.2, False, "the interval includes 1"),
        (1.0, 1.2, False, "the interval includes 1"),
        (0.8, 0.9, False, "the thinned model is slower"),
        (0.8, 0.9, True, ""),
        (0.8, 1.0, True, "the interval includes 1"),
        (1.1, 1.2, True, "the thinned model takes more energy"),
        (None, None, False, "a single round has no interval"),
    ],
)
def test_a_gain_is_a_whole_interval_on_the_better_side(
    low: float | None, high: float | None, less: bool, reason: str
) -> None:
    assert no_gain(low, high, less=less) == reason
    what = "energy" if less else "decode"
    assert row(what=what, ratio=Spread(value=1.0, low=low, high=high)).verdict == reason
    assert "masks" in no_gain(low, high, less=less, alike=True), "equal shapes gain nothing, whatever the clock says"


def test_rows_become_evidence_that_says_no_gain_in_bold() -> None:
    dense, thinned, ratio = row().evidence()
    assert {e.name for e in (dense, thinned, ratio)} == {"prefill@transformers:4x128"}
    assert (dense.of, dense.value, dense.low, dense.unit, dense.n) == ("dense", 100.0, 90.0, "tokens/s", 2)
    assert (thinned.of, ratio.of, ratio.value, ratio.low) == ("thinned", "ratio", 1.3, 1.2)
    assert NO_GAIN not in ratio.how
    *_, slow = row(ratio=Spread(value=0.9, low=0.8, high=1.1)).evidence()
    assert slow.how.endswith("; **no gain**: the interval includes 1")
    *_, masked = row(alike=True, what="energy", source="energy of package-0").evidence()
    assert "prompt included" in masked.how
    assert "energy of package-0; **no gain**: all shapes" in masked.how
    other = Evidence(name="loss", value=1.0, of="ratio", how="thinned / dense")
    assert no_gains([ratio, slow, other]) == (
        "**no gain** of prefill@transformers:4x128: ×0.9, the interval includes 1",
    )


def test_memory_becomes_evidence_as_far_as_it_is_known() -> None:
    held = Held(engine="llamacpp", of="thinned", batch=1, length=8, weights=5, process=9)
    found = {e.name: e.value for e in held.evidence()}
    assert found == {"weights@llamacpp:1x8": 5.0, "process@llamacpp:1x8": 9.0}


def test_a_file_of_the_first_format_is_read_and_written_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    path.write_text(FIRST, encoding="utf-8")
    found = SpeedFile.load(path)
    assert found.to_data() == json.loads(FIRST)
    found.save(path)
    assert SpeedFile.load(path) == found
    asked = found.get("transformers", "decode", 1, 128)
    assert asked is not None
    assert asked.ratio == Spread(value=1.2, low=1.1, high=1.3)
    assert found.get("llamacpp", "decode", 1, 128) is None
    assert len(found.evidence()) == 3 + 2
    with pytest.raises(FrozenInstanceError):
        found.of = "x"  # type: ignore[misc]


@pytest.mark.parametrize(("change", "words"), [({"lamina": 2}, "format"), ({"row": []}, "unknown key 'row'")])
def test_other_formats_and_unknown_keys_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        SpeedFile.from_data({**json.loads(FIRST), **change})
    assert SpeedFile.from_data({"lamina": 1, "rows": []}).evidence() == ()
