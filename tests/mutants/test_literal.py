"""Token means against literal sums over rows of unequal length: each token counts the same, whatever its row."""

from __future__ import annotations

import math

import pytest

from lamina.lab.tally import PerToken
from lamina.testing.bench import lab_on, rows
from lamina.testing.models import padded


def test_token_means_are_literal() -> None:
    bench = lab_on(padded(rows(), 4))
    kinds = {s.kind for s in bench.anatomy.sites}
    found = bench.stream([PerToken("norm", sorted(kinds), lambda taps: taps.ff.sqrt())])[0]
    sums: dict[str, list[float]] = {}
    for row in rows():
        alone = lab_on([{"input_ids": row.unsqueeze(0)}])
        for site, value in alone.stream([PerToken("norm", sorted(kinds), lambda taps: taps.ff.sqrt())])[
            0
        ].values.items():
            sums.setdefault(site, []).append(float(value[0]) * len(row))
    tokens = sum(len(r) for r in rows())
    for site, values in sums.items():
        assert found[site] == pytest.approx(math.fsum(values) / tokens, rel=1e-5), site
