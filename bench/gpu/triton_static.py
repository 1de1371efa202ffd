"""What the compiler says of the kernels, with no device: `python -m bench.gpu.triton_static`.

Each kernel is compiled with the tiles that ship as defaults for representative problems, for each
architecture. The committed report holds registers, shared memory, spills and matrix instructions;
`--check` compiles again and exits 1 where a figure got worse; with another version of triton it
compares the matrix instructions only.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.gpu.static import RESULTS, code_of, cuobjdump, finish, instructions, regressions
from mpo_kernels.backends.triton.chain import chain_kernel
from mpo_kernels.backends.triton.device import begins_early
from mpo_kernels.backends.triton.gather import gather_gradient_kernel, gather_kernel
from mpo_kernels.backends.triton.matrix import constants, matrix_kernel
from mpo_kernels.backends.triton.panels import gemm_task, merging_task, panel_tasks, parting_tasks
from mpo_kernels.backends.triton.product import Task, product_kernel
from mpo_kernels.backends.triton.tiles import (
    LIMITS,
    MATRIX_ROWS,
    Chain,
    Limits,
    MatrixTile,
    Strides,
    TwoParts,
)
from mpo_kernels.backends.triton.tuning import TILES

REPORT = RESULTS / "triton_static.json"
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}

SKEWED = Chain(256, 16, 16, 256, 64, 4096, 4096, True)
BALANCED = Chain(64, 64, 64, 64, 64, 4096, 4096, False)
WIDE = Chain(64, 112, 64, 128, 16, 4096, 14336, False)
WIDE_EXCHANGED = Chain(112, 64, 128, 64, 16, 14336, 4096, False, True)
LOW_RANK = Chain(4096, 1, 1, 4096, 128, 4096, 4096, True)
PAPER = Chain(12, 16, 64, 192, 32, 768, 3072, False)
ODD = Chain(48, 20, 6, 12, 5, 280, 239, True)
TABLE = TwoParts(200, 32, 153, 24, 64, 30522, 768)
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    """A kernel, the problem and row bucket its default tile is for, and the operands' dtype."""

    kernel: str
    problem: Chain | TwoParts
    rows: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        a_in, a_out, b_in, b_out, rank = self.problem[:5]
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"({a_in}, {b_in}) -> ({a_out}, {b_out}), D {rank}"
        return f"{self.kernel} {sizes}, {self.rows} rows, {dtype}"


MATRIX = (BALANCED, WIDE, WIDE_EXCHANGED, PAPER, ODD)
CASES = [
    *(Case("chain", p, rows, BF16) for p in (SKEWED, BALANCED, LOW_RANK) for rows in (1, 16, 64)),
    *(Case("chain", p, 64, BF16) for p in (PAPER, ODD)),
    *(Case("chain", p, 64, FP32) for p in (SKEWED, ODD)),
    *(Case(k, p, 4096, BF16) for k in ("matrix", "matrix_gradient") for p in MATRIX),
    *(Case(k, BALANCED, 256, BF16) for k in ("matrix", "matrix_gradient")),
    *(Case(k, TABLE, 4096, dtype) for k in ("gather", "gather_gradient") for dtype in (BF16, FP32)),
]


# The exact five cores of 768 -> 3072 in halves, and two parts of 4096 -> 4096.
FIVE = ((1, 12, 16, 192), (192, 4, 8, 384), (384, 16, 24, 1))
T4, T5 = (384, 4, 6, 16), (16, 4, 4, 1)
PAIR = ((1, 64, 64, 64), (64, 64, 64, 1))


def products(limits: Limits) -> dict[str, tuple[Task, str]]:
    """Products of digits as panels run them, and which of A, B and C are in fp32."""
    columns, rows = panel_tasks(FIVE, 8, False, 2, limits), panel_tasks(FIVE, 6, True, 2, limits)
    of_left, of_core = parting_tasks(T4, T5, 8, 2, limits, 768 * 3072 // 2)
    pair = panel_tasks(PAIR, 32, False, 2, limits)
    return {
        "T4 T5": (merging_task(T4, T5, 2, limits), ""),
        "A B": (columns.lefts[0], ""),
        "W, columns": (columns.form, ""),
        "W, rows": (rows.form, ""),
        "dC": (rows.of_part[1], "c"),
        "dW Cᵀ": (rows.flows[1], ""),
        "dA": (rows.flows[0], "c"),
        "dT4": (of_left, "ac"),
        "dT5": (of_core, "bc"),
        "x W": (gemm_task(768, 1536, (768, 1536, 3072), 4096, 2, limits), ""),
        "W of two parts": (pair.form, ""),
    }


def arguments(case: Case) -> tuple[Any, list[tuple[str, Any]]]:
    """The kernel and its arguments before the constants: (name, type) in the kernel's order."""
    pointer = TYPES[case.dtype]
    row = [("rows", "i32"), ("stride_xm", "i64"), ("stride_xk", 1)]
    if case.kernel == "chain":
        names = ("p_x", "p_first", "p_second", "p_bias", "p_y")
        return chain_kernel, [*((name, pointer) for name in names), *row]
    if case.kernel in ("matrix", "matrix_gradient"):
        gradient = case.kernel == "matrix_gradient"
        pointers = [(name, pointer) for name in ("p_a", "p_b", "p_c")]
        pointers.append(("p_bias", None if gradient else pointer))
        pointers.append(("p_out", "*fp32" if gradient else pointer))
        counts = [(name, "i32") for name in ("matrices", "steps", "steps_per_split")]
        strides = [(f"stride_{name}", "i32") for name in ("a", "b", "c", "out")]
        return matrix_kernel, [*pointers, *counts, *strides]
    if case.kernel == "gather":
        pointers = [("p_ids", "*i64"), *((n, pointer) for n in ("p_left", "p_right", "p_rows"))]
        return gather_kernel, pointers
    pointers = [("p_grad", pointer), ("p_ids", "*i64"), ("p_order", "*i64"), ("p_other", pointer)]
    strides = [("p_out", "*fp32"), ("tokens", "i32"), ("stride_gm", "i64"), ("stride_gk", 1)]
    return gather_gradient_kernel, [*pointers, *strides]


def strides_as_cores_lie(problem: Chain | TwoParts) -> Strides:
    """Of parts ``[in, out, D]``: the bond is minor in the left one, ``out`` in the right one."""
    a_in, a_out, b_in, b_out, rank = problem[:5]

    def left(out: int) -> tuple[int, int, int]:
        return out * rank, rank, 1

    def right(ins: int, out: int) -> tuple[int, int, int]:
        return out, 1, ins * out

    if isinstance(problem, Chain) and problem.first_minor:
        return Strides(*right(a_in, a_out), *left(b_out))
    return Strides(*left(a_out), *right(b_in, b_out))


def compiled(case: Case, tile: Any, limits: Limits) -> Any:
    """What triton makes of a case with that tile for that architecture."""
    kernel, given = arguments(case)
    if kernel is matrix_kernel:
        values = constants(case.problem, case.kernel == "matrix_gradient", tile)
        names = kernel.arg_names[-len(values) :]
        return build(kernel, given, dict(zip(names, values, strict=True)), limits, tile)
    fixed = {"S": case.problem, "P": strides_as_cores_lie(case.problem), "T": tile}
    fixed |= {"PRECISION": "ieee"}
    if case.kernel == "gather_gradient":
        fixed["OF_LEFT"] = True
    return build(kernel, given, fixed, limits, tile)


def default_tile(case: Case, limits: Limits) -> Any:
    """The first of the case's tiles, None where the kernel is not offered on that architecture."""
    tiles = TILES[case.kernel](case.problem, case.rows, case.dtype.itemsize, limits)
    return tiles[0][1] if tiles else None


def compiled_product(task: Task, fp32: str, limits: Limits) -> Any:
    """A product alone in its launch, in bf16 but for the operands named in ``fp32``."""
    pointers = [(f"p_{x}", "*fp32" if x in fp32 else "*bf16") for x in "abc"]
    pointers.insert(2, ("p_bias", "*bf16" if task.product.m == 0 else None))
    given = [*pointers, ("rows", "i32"), ("first", "i32"), *((f"q_{x}", None) for x in "abc")]
    constants = {"P": task.product, "T": task.tile, "Q": None, "U": None, "ADD": False}
    constants |= {"PRECISION": "ieee", "EARLY": begins_early(limits.name)}
    return build(product_kernel, given, constants, limits, task.tile)


def build(
    kernel: Any, given: list[tuple[str, Any]], constants: dict[str, Any], limits: Limits, tile: Any
) -> Any:
    """Compile for an architecture, as a call with aligned operands on it would."""
    constants = constants | {name: kind for name, kind in given if not isinstance(kind, str)}
    signature = {name: kind if isinstance(kind, str) else "constexpr" for name, kind in given}
    signature |= {name: "constexpr" for name in constants}
    signature = {name: signature[name] for name in kernel.arg_names}
    aligned = {
        (k,): [["tt.divisibility", 16]]
        for k, name in enumerate(kernel.arg_names)
        if name.startswith("p_") or (name.startswith("stride") and name not in constants)
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(
        source,
        target=target(limits),
        options={"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )


def target(limits: Limits) -> GPUTarget:
    """What triton compiles for."""
    if limits.name.startswith("sm_"):
        return GPUTarget("cuda", int(limits.name[3:]), limits.warp)
    return GPUTarget("hip", limits.name, limits.warp)


def figures(built: Any, assembly: str) -> dict[str, int]:
    """Registers a thread, bytes spilled, bytes of shared memory, matrix instructions by kind."""
    if "cubin" in built.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"])
            file.flush()
            usage = cuobjdump(file.name, "--dump-resource-usage")
        registers, spilled = map(int, re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0])
        kinds = {"wgmma": "HGMMA", "tcgen05": "UTC[HQ]MMA", "mma": "HMMA"}
    else:
        registers, spilled = (
            int(re.findall(rf"\.vgpr_{field}:\s+(\d+)", assembly)[0])
            for field in ("count", "spill_count")
        )
        kinds = {"mfma": "v_mfma_\\w+"}
    found = {"registers": registers, "spilled": spilled, "shared": built.metadata.shared}
    if "cubin" in built.asm:
        # Loads from and stores to memory of less than 128 bits a thread.
        found["narrow"] = len(re.findall(r"\b(?:LDG|LDGSTS|STG)\.(?!\S*\b128\b)", assembly))
    counts = {name: len(re.findall(rf"\b{code}\b", assembly)) for name, code in kinds.items()}
    return found | {name: count for name, count in counts.items() if count}


def assemblies(built: list[Any]) -> list[str]:
    """What the device runs of each, all compiled for one architecture."""
    if "cubin" not in built[0].asm:
        return [one.asm["amdgcn"] for one in built]
    architecture = re.findall(r"\.target (sm_\w+)", built[0].asm["ptx"])[0]
    codes = [b"".join(code_of(one.asm["cubin"]).values()) for one in built]
    return instructions(codes, architecture)


def walk_figures(assembly: str) -> dict[str, int]:
    """Of ``matrix.py``: how many products read the state from registers, and what moves it.

    `from_registers` are wgmma whose first operand is, `moves` instructions between matrix
    instructions that would take the state through shared memory, `narrow_copies` those to shared
    memory and stores below 128 bits.
    """
    lines = assembly.splitlines()
    products = [k for k, line in enumerate(lines) if re.search(r"\bHG?MMA\b", line)]
    between = lines[products[0] : products[-1]]
    wgmma = any("HGMMA" in line for line in lines)
    # What is not wgmma reads the other operands into registers, from where they were copied to.
    moving = r"\b(STS|STSM|LDS|LDSM)\b" if wgmma else r"\b(STS|STSM)\b"
    copies = [line for line in lines if re.search(r"\b(LDGSTS|STG)\b", line)]
    return {
        "from_registers": sum(bool(re.search(r"HGMMA\S* R\d+, R\d+", line)) for line in lines),
        "moves": sum(bool(re.search(moving, line)) for line in between),
        "narrow_copies": sum(".128" not in line for line in copies),
    }


def faults(dtype: torch.dtype, rows: int, found: dict[str, int], limits: Limits) -> list[str]:
    """What a shipped default must not do: spill, pass the memory, miss the matrix instructions.

    Args:
        dtype: of the operands.
        rows: of the smaller of a tile's products.
        found: see :func:`figures`.
        limits: of the architecture.
    """
    wrong = []
    if found["spilled"]:
        wrong.append(f"spills {found['spilled']} bytes")
    if found["shared"] > limits.shared_memory:
        wrong.append(f"{found['shared']} bytes of shared memory, there are {limits.shared_memory}")
    if limits.name == "sm_90" and dtype.itemsize == 2 and rows >= 64:
        wrong += [] if "wgmma" in found else ["no wgmma"]
        wrong += ["mma beside wgmma"] if "mma" in found else []
    return wrong


def walk_faults(
    problem: Chain, tile: MatrixTile, found: dict[str, int], limits: Limits
) -> list[str]:
    """What a default of ``matrix.py`` must not do either: take the state out of registers."""
    wrong = []
    state = tile.matrices * tile.block_j // 16 if limits.name == "sm_90" else 0
    if found["from_registers"] != state:
        wrong.append(f"{found['from_registers']} wgmma of {state} read the state in registers")
    if all(size % 8 == 0 for size in problem[:4]):
        # Else operands come in pieces that no copy takes to shared memory by itself.
        wrong += ["moves through shared memory between products"] if found["moves"] else []
        wrong += ["copies below 128 bits"] if found["narrow_copies"] else []
    return wrong


def early_faults(assembly: str, limits: Limits) -> list[str]:
    """What a product must not do either: touch memory before what came before it has ended."""
    if not begins_early(limits.name):
        return []
    order = re.findall(r"\b(ACQBULK|PREEXIT|LDG\w*|STG|UTMA\w*|RED|ATOMG)\b", assembly)
    right = order[:2] == ["ACQBULK", "PREEXIT"] and order.count("ACQBULK") == 1
    return [] if right else [f"begins with {', '.join(order[:3])}"]


def _matrix_rows(case: Case, tile: Any) -> int:
    """Rows of the smaller of a tile's two products."""
    if case.kernel == "chain":
        return tile.block_b * min(tile.group_in, tile.group_out)
    if case.kernel.startswith("matrix"):
        return MATRIX_ROWS
    return tile.block_left


def report(architectures: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The report, and a line for each fault."""
    rows: dict[str, Any] = {}
    wrong = []
    for name in architectures:
        limits = LIMITS[name]
        # Title, tile, what is compiled, dtype, rows of the smaller product, the case of a walk.
        made: list[tuple[str, Any, Any, torch.dtype, int, Case | None]] = []
        for case in CASES:
            if (tile := default_tile(case, limits)) is None:
                continue
            built, of_walk = compiled(case, tile, limits), case.kernel.startswith("matrix")
            least = _matrix_rows(case, tile)
            made.append((case.name, tile, built, case.dtype, least, case if of_walk else None))
        for title, (task, fp32) in products(limits).items():
            built = compiled_product(task, fp32, limits)
            dtype = FP32 if "a" in fp32 or "b" in fp32 else BF16
            made.append((f"product {title}", task.tile, built, dtype, task.tile.block_m, None))
        rows[name] = {}
        texts = assemblies([built for _, _, built, *_ in made])
        for (title, tile, built, dtype, least, walk), text in zip(made, texts, strict=True):
            found = figures(built, text)
            wrong_here = faults(dtype, least, found, limits)
            if walk is not None:
                found |= walk_figures(text)
                wrong_here += walk_faults(walk.problem, tile, found, limits)
            if title.startswith("product "):
                wrong_here += early_faults(text, limits)
            rows[name][title] = {"tile": list(tile), **found}
            wrong += [f"{name} {title}: {fault}" for fault in wrong_here]
        print(f"{name}: {len(rows[name])} kernels compiled", file=sys.stderr)
    return {"triton": triton.__version__, "architectures": rows}, wrong


def regressed(committed: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What got worse since the committed report; by another compiler, what lacks instructions."""
    measures = "registers", "spilled", "shared", "narrow"
    limits = measures if committed["triton"] == now["triton"] else ()
    kinds = ("mfma", "mma", "tcgen05", "wgmma", "from_registers")
    return regressions(committed, now, limits, kinds)


def main(argv: list[str] | None = None) -> int:
    """Write the report or compare with it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.triton_static", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, exit 1 on a regression")
    parser.add_argument(
        "--arch", nargs="+", choices=LIMITS, default=list(LIMITS), help="with --check (all)"
    )
    options = parser.parse_args(argv)
    if not options.check and set(options.arch) != set(LIMITS):
        parser.error("expected --check with --arch: the report is of every architecture")
    now, wrong = report(options.arch)
    if options.check and json.loads(REPORT.read_text(encoding="utf-8"))["triton"] != now["triton"]:
        # Tiles are chosen for one compiler; another must build the same instructions.
        wrong = [line for line in wrong if " spills " not in line]
    return finish(REPORT, now, wrong, regressed if options.check else None)


if __name__ == "__main__":
    sys.exit(main())
