"""Decoding: one layer at 1–16 rows, and a whole decoder block, beside dense, Triton and low rank.

``python -m bench.gpu.decode --output results/gpu/decode.json`` on a GPU times replays of a captured
stack of layers of one shape, each with cores of its own, from a cold second-level cache; and the
host's time of an eager call. A table goes beside the file. Every way but ``lowrank`` (other
numbers, as many) is first held against fp64.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import facts
from bench.layer.cases import COMPRESSIONS, FACTORISATIONS, SHAPES, TWO_FACTORS, Case
from bench.layer.measure import host_microseconds, interleave, measure_roofline
from bench.layer.problem import Problem
from bench.layer.ways import WAYS
from bench.results import Record, Results
from mpo_kernels import MPOLinear, available_backends, use_backend
from mpo_kernels.backends import selected
from mpo_kernels.backends.cuda.decode import chain_of
from mpo_kernels.planning.plan import Plan

SIZES = ("4096x4096", "4096x14336", "768x3072", "8192x28672")
ROWS = (1, 16, 2, 4, 8)
# Layers one after the other, as in a model: cores are read for the first time, code is not.
LAYERS = 8
# What a kernel with next to nothing to do takes in a captured stack, in seconds: no floor is below.
LEAST = 1.5e-6
STORED = {"cuda, int8": torch.int8, "cuda, fp8": torch.float8_e4m3fn}
# Relative error against fp64: of bf16, and of a byte an element.
TOLERANCE = {"cuda, int8": 5e-2, "cuda, fp8": 1e-1}


def chosen(layer: MPOLinear, rows: int, algorithm: str | None = None) -> Plan:
    """The plan for some rows, of one algorithm where that is asked for."""
    plan = layer.plan(rows)
    return next((p for p in plan.candidates if algorithm in (None, p.algorithm)), plan)


def ways_of(problem: Problem) -> Iterator[tuple[str, list[Callable[[], Tensor]], Plan]]:
    """(name, the call of each layer, ours' plan) of each way that this machine has."""
    x, bias, shape = problem.x, problem.bias, problem.shape
    outs = shape.out_features

    def layers(name: str) -> list[nn.Module]:
        copies = ([core.clone() for core in problem.cores] for _ in range(LAYERS))
        return [WAYS[name].build(cores, bias, shape).requires_grad_(False) for cores in copies]

    ours = layers("ours")
    plan = ours[0].plan(problem.rows)
    for name in ("dense", "lowrank"):
        yield name, [partial(module, x) for module in layers(name)], plan
    yield "ours", [partial(module, x) for module in ours], plan
    usable = [name for name, (there, _) in available_backends().items() if there]
    for name in usable:
        with use_backend(name):
            plan = chosen(ours[0], problem.rows, "decode" if name == "cuda" else None)
            backend = selected(x)
        yield (
            name,
            [partial(backend.linear, x, list(m.cores), bias, outs, plan) for m in ours],
            plan,
        )
    if "cuda" in usable:
        for name, dtype in STORED.items():
            yield name, [partial(module.quantized(dtype), x) for module in ours], plan


def measure(case: Case, device: torch.device, bandwidth: float) -> Record:
    """A record: microseconds of every way, errors, the floor."""
    problem = Problem(case.shape, case.rows, device, torch.bfloat16)
    calls, plans = {}, {}
    for name, of_layers, plan in ways_of(problem):
        calls[name], plans[name] = of_layers, plan
    record: dict[str, Any] = {
        "case": f"{case.size}/{case.factorisation}",
        "rows": case.rows,
        "ranks": case.shape.ranks,
        "compression": case.shape.dense_parameters / case.shape.num_parameters,
        "floor_us": 1e6 * max(LEAST, 2 * case.shape.num_parameters / bandwidth),
        "ways": {},
    }
    for name, of_layers in calls.items():
        error = None if name == "lowrank" else problem.forward_error(of_layers[0]())
        way = record["ways"][name] = {"error": error}
        if error is not None and not error < TOLERANCE.get(name, 3e-2):
            way["wrong"] = True
        if name not in ("dense", "lowrank", *STORED):
            way["plan"] = f"{plans[name].algorithm} {plans[name].order}"
            way["predicted_us"] = plans[name].predicted_us
            if plans[name].launches:
                way["launches"] = [str(launch.tile) for launch in plans[name].launches]
    stacks = {name: partial(run, of_layers) for name, of_layers in calls.items()}
    for name, timing in interleave(stacks, 2e-3, device, min_repeats=15).items():
        us = (timing.median_us, timing.q1_us, timing.q3_us)
        record["ways"][name] |= dict(zip(("us", "q1", "q3"), (t / LAYERS for t in us), strict=True))
        record["ways"][name]["captured"] = timing.captured
        if device.type == "cuda":
            record["ways"][name]["host_us"] = host_microseconds(calls[name][0], device)
    return record


def run(of_layers: Sequence[Callable[[], Tensor]]) -> None:
    for call in of_layers:
        call()


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


def block(rows: int, device: torch.device, width: int, inner: int, held: int) -> Record:
    """A record of the whole block: dense, and MPO at 16 × with its cores in bf16 and int8."""
    heads = (max(1, width // 128), max(1, width // 512))
    like: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    cache = tuple(torch.randn(rows, heads[1], held, 128, **like) for _ in range(2))

    def mpo(ins: int, outs: int) -> MPOLinear:
        return MPOLinear(ins, outs, FACTORISATIONS["skew-16x"](ins, outs), bias=False, **like)

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
    timed = interleave(calls, 5e-3, device, min_repeats=15)
    return {
        "case": f"decoder block {width}/{inner}, skew-16x, {held} keys",
        "rows": rows,
        "ways": {
            name: {
                "us": timing.median_us,
                "captured": timing.captured,
                "bytes": sum(t.nbytes for t in blocks[name].state_dict().values()),
            }
            for name, timing in timed.items()
        },
    }


def table(conditions: dict[str, Any], records: list[Record], left_out: int) -> str:
    """Markdown: the conditions, the goals, every record."""
    machine, commit = conditions["machine"], conditions["git"]["commit"]
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())
    lines = [
        "# Decoding",
        "",
        f"`{conditions['command']}`, {machine.get('gpu', machine['cpu'])}, commit {commit}, "
        f"{versions}. Medians in µs a layer, bf16; on a GPU of a captured stack of {LAYERS} "
        f"layers, each with its own cores, from a cold second-level cache. `ours` is what the "
        f"planner takes. Floor: bytes of the cores at {conditions['bandwidth'] / 1e9:.0f} GB/s, or "
        f"{1e6 * LEAST} µs. Cases left out for want of time: {left_out}.",
        "",
        *goals([r for r in records if "floor_us" in r]),
        "",
    ]
    names = list(dict.fromkeys(name for r in records for name in r["ways"]))
    lines += [
        "| case | rows | floor | " + " | ".join(names) + " |",
        "|---" * (3 + len(names)) + "|",
    ]
    for r in records:
        cells = [
            f"{way['us']:.1f}" + (" (wrong)" if way.get("wrong") else "") if way else "–"
            for way in (r["ways"].get(name) for name in names)
        ]
        floor = f"{r['floor_us']:.1f}" if "floor_us" in r else "–"
        lines.append(f"| {r['case']} | {r['rows']} | {floor} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def goals(layers: Sequence[Record]) -> list[str]:
    """A line for each goal of `ours`: how many points reach it, and the worst."""

    def line(text: str, points: list[tuple[float, str]], limit: float) -> str:
        reached = sum(value <= limit for value, _ in points)
        worst = max(points, default=(0.0, "–"))
        return f"- {text}: {reached} of {len(points)}; worst {worst[0]:.2f} ({worst[1]})"

    floors, ones, fours = [], [], []
    for r in layers:
        us, dense = r["ways"]["ours"]["us"], r["ways"]["dense"]["us"]
        size, _, factorisation = r["case"].partition("/")
        place = f"{r['case']}, {r['rows']} rows"
        compression = int(factorisation.partition("-")[2][:-1])
        floors.append((us / r["floor_us"], place))
        if r["rows"] == 1 and size != "768x3072" and compression >= 4:
            ones.append((us / dense, place))
        if r["rows"] == 1 and size == "4096x14336" and compression >= 16:
            fours.append((4 * us / dense, place))
    return [
        line("time ÷ floor at most 1 / 0.7", floors, 1 / 0.7),
        line("time ÷ dense at most 1, one row, from 4096², 4 × and more", ones, 1.0),
        line("4 × time ÷ dense at most 1, 4096x14336, one row, 16 × and 64 ×", fours, 1.0),
    ]


def cases_of(sizes: Sequence[str], rows: Sequence[int]) -> Iterator[Case]:
    """Every kind of two factors at every compression, what is asked first first."""
    for each, size, times, kind in product(rows, sizes, COMPRESSIONS, TWO_FACTORS):
        yield Case(size, f"{kind}-{times}x", each)


def predictions(rows: int) -> str:
    """Markdown: what the schedule's model gives for an H200, the launch aside; needs no device."""
    limits, lines = (90, 132, 227 << 10), ["| case | µs | schedule |", "|---|---:|---|"]
    for case in cases_of(SIZES, (rows,)):
        shape, dtype = case.shape, torch.bfloat16
        sizes = [torch.empty(size, device="meta") for size in shape.core_shapes]
        layouts = tuple((core.shape, core.stride(), True) for core in sizes)
        features = (shape.in_features, shape.out_features)
        chains = [
            chain_of(layouts, rows, features, from_left, dtype, dtype, limits)
            for from_left in (True, False)
        ]
        best = min((c for c in chains if c is not None), key=lambda c: c.seconds)
        lines.append(f"| {case.size}/{case.factorisation} | {1e6 * best.seconds:.1f} | {best} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.decode", description=__doc__)
    parser.add_argument("--device", default="cuda")
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--output", type=Path, help="a JSON file; .md beside it")
    choice.add_argument(
        "--predict", type=int, metavar="ROWS", help="print what the model gives; needs no GPU"
    )
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=SIZES, metavar="IxJ")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--budget-minutes", type=float, default=4.0)
    options = parser.parse_args(argv)
    if options.predict:
        print(predictions(options.predict))
        return 0
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("expected a GPU, found none; --device cpu tries the program")
    end = time.monotonic() + 60 * options.budget_minutes
    bandwidth = measure_roofline(device, torch.bfloat16).bytes_per_second
    conditions = {
        "command": facts.command("bench.gpu.decode", sys.argv[1:] if argv is None else argv),
        "machine": facts.machine(device),
        "versions": facts.versions(),
        "git": facts.commit(),
        "device": str(device),
        "dtype": "bfloat16",
        "bandwidth": bandwidth,
    }
    results, left_out = Results(options.output, conditions, resume=False), 0
    (width, _), (_, inner) = SHAPES[options.sizes[0]], SHAPES[options.sizes[1 % len(options.sizes)]]
    for rows in options.rows[:2]:
        results.add(block(rows, device, width, inner, 1024))
    for case in cases_of(options.sizes, options.rows):
        if time.monotonic() > end:
            left_out += 1
            continue
        results.add(measure(case, device, bandwidth))
    text = table(results.conditions, results.records, left_out)
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    wrong = [r for r in results.records if any(w.get("wrong") for w in r["ways"].values())]
    for record in wrong:
        print(f"wrong: {record['case']}, {record['rows']} rows", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
