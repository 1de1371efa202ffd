"""A decoder block at few rows: dense, ours at 16 × in bf16, and in bytes.

``python -m bench.gpu.decoder --output results/gpu/decoder.json`` on a GPU times replays of the
captured block, and eager calls of it, from a cold second-level cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import facts
from bench.layer.cases import FACTORISATIONS
from bench.layer.measure import interleave
from bench.results import Record, Results
from mpo_kernels import MPOLinear

# Llama's, over so many keys.
WIDTH, INNER, KEYS = 4096, 14336, 1024


class DecoderBlock(nn.Module):
    """A Llama-like layer at one new token a sequence, over a cache of keys and values.

    ``x [rows, width] -> [rows, width]``; ``linear(ins, outs)`` makes its seven matrices.
    """

    def __init__(
        self,
        linear: Callable[[int, int], nn.Module],
        width: int,
        inner: int,
        heads: tuple[int, int],
        cache: tuple[Tensor, Tensor],
    ) -> None:
        super().__init__()
        self.heads, (self.keys, self.values) = heads, cache
        small = width // heads[0] * heads[1]
        self.q, self.k, self.v = linear(width, width), linear(width, small), linear(width, small)
        self.o, self.gate, self.up = (
            linear(width, width),
            linear(width, inner),
            linear(width, inner),
        )
        self.down = linear(inner, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        rows, (heads, groups) = len(x), self.heads
        h = self.norms[0](x)
        q = self.q(h).view(rows, heads, 1, -1)
        new = [part(h).view(rows, groups, 1, -1) for part in (self.k, self.v)]
        keys, values = (
            torch.cat([held, part], 2)
            for held, part in zip((self.keys, self.values), new, strict=True)
        )
        attended = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        x = x + self.o(attended.reshape(rows, -1))
        h = self.norms[1](x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def measure(rows: int, device: torch.device, width: int, inner: int, held: int) -> Record:
    """A record of the whole block: dense, and MPO at 16 × with its cores in bf16 and int8."""
    heads = (max(1, width // 128), max(1, width // 512))
    like: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    cache = tuple(torch.randn(rows, heads[1], held, 128, **like) for _ in range(2))

    def mpo(ins: int, outs: int) -> MPOLinear:
        layer = MPOLinear(ins, outs, FACTORISATIONS["skew-16x"](ins, outs), bias=False, **like)
        return layer.merged(rows)

    makers: dict[str, Callable[[int, int], nn.Module]] = {
        "dense": lambda ins, outs: nn.Linear(ins, outs, bias=False, **like),
        "ours": mpo,
        "ours, int8": lambda ins, outs: mpo(ins, outs).quantized(torch.int8),
    }
    x = torch.randn(rows, width, **like)
    blocks = {
        name: DecoderBlock(make, width, inner, heads, cache).to(**like).requires_grad_(False)
        for name, make in makers.items()
    }
    calls = {name: lambda module=module: module(x) for name, module in blocks.items()}
    replays, eager = (
        interleave(calls, 5e-3, device, min_repeats=15, capture=capture)
        for capture in (True, False)
    )
    return {
        "case": f"decoder block {width}/{inner}, skew-16x, {held} keys",
        "rows": rows,
        "ways": {
            name: {
                "us": replays[name].median_us,
                "captured": replays[name].captured,
                "eager_us": eager[name].median_us,
                "bytes": sum(t.nbytes for t in blocks[name].state_dict().values()),
            }
            for name in blocks
        },
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.decoder", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file")
    parser.add_argument("--rows", nargs="+", type=int, default=(1, 16), metavar="N")
    parser.add_argument(
        "--sizes", nargs=2, type=int, default=(WIDTH, INNER), metavar=("WIDTH", "INNER")
    )
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("expected a GPU, found none; --device cpu tries the program")
    given = sys.argv[1:] if argv is None else argv
    conditions = facts.conditions(
        "bench.gpu.decoder", given, device, device=str(device), dtype="bfloat16"
    )
    try:
        results = Results(options.output, conditions, resume=False)
    except ValueError as error:
        parser.error(str(error))
    for rows in options.rows:
        record = measure(rows, device, *options.sizes, KEYS)
        results.add(record)
        print(record, file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
