"""The decoder block of the bench, small and on a CPU: what it computes, and what is kept of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.gpu import decoder


def test_a_new_token_attends_to_what_is_held_and_itself() -> None:
    torch.manual_seed(0)
    cache = tuple(torch.randn(3, 1, 7, 128) for _ in range(2))
    linear = lambda ins, outs: nn.Linear(ins, outs, bias=False)  # noqa: E731
    block = decoder.DecoderBlock(linear, 256, 40, (2, 1), cache)
    x = torch.randn(3, 256)
    h = F.rms_norm(x, (256,))
    q = block.q(h).view(3, 2, 128)
    keys, values = (
        torch.cat([held[:, 0], part(h)[:, None]], 1)
        for held, part in zip(cache, (block.k, block.v), strict=True)
    )
    weights = (q @ keys.transpose(1, 2) / 128**0.5).softmax(-1)
    y = x + block.o((weights @ values).flatten(1))
    h = F.rms_norm(y, (256,))
    y = y + block.down(F.silu(block.gate(h)) * block.up(h))
    torch.testing.assert_close(block(x), y, rtol=1e-4, atol=1e-4)


def test_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    timed = decoder.interleave
    monkeypatch.setattr(
        decoder, "interleave", lambda *a, **k: asked.append(k["capture"]) or timed(*a, **k)
    )
    options = ["--device", "cpu", "--sizes", "256", "320", "--rows", "2"]
    assert decoder.main([*options, "--output", str(tmp_path / "block.json")]) == 0
    (record,) = json.loads((tmp_path / "block.json").read_text())["records"]
    ways = record["ways"]
    assert ways["ours, int8"]["bytes"] < 0.6 * ways["ours"]["bytes"] < 0.1 * ways["dense"]["bytes"]
    assert all(way["us"] > 0 < way["eager_us"] for way in ways.values())
    assert asked == [True, False]
