"""What budgets mean on the command line and in Python."""

from __future__ import annotations

from typing import Any

import pytest

from lamina.core.documents import Budget, Limit
from lamina.options import budget_of


@pytest.mark.parametrize(
    ("asked", "means"),
    [
        ({"keep": "75%"}, Budget(keep=0.75)),
        ({"parameters": "100M"}, Budget(limit=100_000_000)),
        ({"bytes": "0.5x"}, Budget(metric="bytes", keep=0.5)),
        ({"bytes": "90MB"}, Budget(metric="bytes", limit=90_000_000)),
        ({"kv": "0.5x@32k"}, Budget(metric="kv_bytes", keep=0.5, at="32768")),
        ({"kv": "40%"}, Budget(metric="kv_bytes", keep=0.4)),
        ({"kv": "1GB@1000"}, Budget(metric="kv_bytes", limit=10**9, at="1000")),
        ({"latency": "0.7x@decode"}, Budget(metric="latency", keep=0.7, at="decode")),
        ({"latency": "20ms@prefill:4x512"}, Budget(metric="latency", limit=0.02, at="prefill:4x512")),
        (
            {"bytes": "50%", "kv": "0.5x@8k", "latency": "70%@decode"},
            Budget(
                metric="bytes", keep=0.5,
                also=(
                    Limit(metric="kv_bytes", keep=0.5, at="8192"), Limit(metric="latency", keep=0.7, at="decode"),
                ),
            ),
        ),
    ],
    ids=str,
)  # fmt: skip
def test_budgets_are_read(asked: dict[str, Any], means: Budget) -> None:
    got = budget_of(asked)
    assert got == means
    assert got is not None
    assert Budget.from_data(got.to_data()) == got


def test_needs_are_what_must_go() -> None:
    assert Limit(keep=0.75).need(1001) == 251
    assert Limit(limit=400).need(1000) == 600
    assert Limit(limit=2000).need(1000) == 0
    assert Limit(metric="kv_bytes", limit=32_000, at="100").need(400) == 80, "per token, of 400"
    assert Limit(metric="latency", keep=0.75, at="decode").need(0.02) == pytest.approx(0.005)


def test_a_resource_is_named_with_its_work() -> None:
    assert Limit(metric="latency", keep=0.5, at="decode").resource == "latency@decode:1x512"
    assert Limit(metric="latency", keep=0.5, at="prefill:4x64").resource == "latency@prefill:4x64"
    assert Limit(metric="kv_bytes", keep=0.5, at="512").resource == "kv_bytes"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"metric": "latency", "keep": 0.5}, "prefill or decode"),
        ({"metric": "latency", "keep": 0.5, "at": "decode:0x5"}, "prefill or decode"),
        ({"metric": "kv_bytes", "limit": 5}, "at a number of tokens"),
        ({"metric": "kv_bytes", "keep": 0.5, "at": "0"}, "at a number of tokens"),
        ({"metric": "bytes", "keep": 0.5, "at": "32"}, "same at all lengths"),
        ({"keep": 0.5, "also": [{"keep": 0.25}]}, "one limit for each resource"),
        ({"keep": 0.5, "also": [{"metric": "bytes"}]}, "exactly one of keep and limit"),
    ],
)
def test_what_a_budget_cant_be(data: dict[str, Any], says: str) -> None:
    from lamina.core.errors import InputError

    with pytest.raises(InputError, match=says):
        Budget.from_data(data)
