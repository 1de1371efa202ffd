"""Every kernel compiles for every architecture as the committed report says, with no device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from bench.gpu import triton_static
from mpo_kernels.backends.triton.tiles import FEW_ROWS, LIMITS, power_of_two
from mpo_kernels.backends.triton.tuning import TILES

OLDEST = Path(sys.prefix) / "triton-oldest"


@pytest.mark.parametrize("name", LIMITS)
def test_nothing_got_worse_since_the_committed_report(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert triton_static.main(["--check", "--arch", name]) == 0, capsys.readouterr().out


@pytest.mark.skipif(not OLDEST.exists(), reason="make test installs the oldest triton served")
def test_the_oldest_triton_served_builds_the_same_instructions() -> None:
    code = (
        "import triton, sys; from bench.gpu import triton_static; "
        f"assert triton.__version__ != {triton.__version__!r}; "
        "sys.exit(triton_static.main(['--check', '--arch', 'sm_90']))"
    )
    path = os.pathsep.join([str(OLDEST), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_regression_is_seen() -> None:
    row = {"tile": "", "registers": 100, "spilled": 0, "shared": 1000, "wgmma": 4}
    committed = {"triton": "3.7.1", "architectures": {"sm_90": {"chain": row}}}

    def worse(triton: str = "3.7.1", **changed: int) -> list[str]:
        now = {k: v for k, v in {**row, **changed}.items() if v != -1}
        return triton_static.regressed(
            committed, {"triton": triton, "architectures": {"sm_90": {"chain": now}}}
        )

    assert worse() == []
    assert worse(registers=101) == ["sm_90 chain: registers 100 -> 101"]
    assert worse(triton="3.5.1", registers=101) == []
    assert worse(wgmma=-1) == ["sm_90 chain: no wgmma any more"]


def test_spills_and_missing_matrix_instructions_are_faults() -> None:
    def faults(rows: int = 64, **found: int) -> list[str]:
        found = {"spilled": 0, "shared": 1000} | found
        return triton_static.faults(torch.bfloat16, rows, found, LIMITS["sm_90"])

    assert faults(wgmma=4) == []
    assert faults(wgmma=4, spilled=8) == ["spills 8 bytes"]
    assert len(faults(mma=4, shared=1 << 20)) == 3
    assert faults(32, mma=4) == []


def test_products_of_digits_move_wide() -> None:
    """On Hopper, 128 bits a thread to and from memory."""
    report = json.loads(triton_static.REPORT.read_text(encoding="utf-8"))
    rows = report["architectures"]["sm_90"]
    for name in ("A B", "W, columns", "W, rows", "dC", "dW Cᵀ", "dA", "W of two parts"):
        row = rows[f"product {name}"]
        assert row["narrow"] == 0 and row["wgmma"], name


@pytest.mark.parametrize("name", LIMITS)
def test_memory_before_the_wait_is_a_fault(name: str) -> None:
    def faults(*codes: str) -> list[str]:
        return triton_static.early_faults(
            "\n".join(f"  {code} R1 ;" for code in codes), LIMITS[name]
        )

    assert faults("S2R", "ACQBULK", "PREEXIT", "LDGSTS.E.BYPASS.128", "STG.E.128") == []
    for wrong in (
        ("LDG.E.128", "ACQBULK", "PREEXIT"),
        ("PREEXIT", "ACQBULK", "LDG.E.128"),
        ("LDGSTS.E.128", "STG.E"),
    ):
        assert bool(faults(*wrong)) == (name in ("sm_90", "sm_100")), wrong


def test_a_state_that_moves_is_a_fault() -> None:
    limits = LIMITS["sm_90"]
    case = next(case for case in triton_static.CASES if case.kernel == "matrix")
    tile = triton_static.default_tile(case, limits)
    fine = {"from_registers": tile.matrices * tile.block_j // 16, "moves": 0, "narrow_copies": 0}
    assert triton_static.walk_faults(case.problem, tile, fine, limits) == []
    for wrong in ({"from_registers": 0}, {"moves": 8}, {"narrow_copies": 1}):
        faults = triton_static.walk_faults(case.problem, tile, fine | wrong, limits)
        assert len(faults) == 1, wrong


@pytest.mark.parametrize("name", LIMITS)
def test_rows_are_matrices_only_where_the_state_stays_in_registers(name: str) -> None:
    cases = [case for case in triton_static.CASES if case.kernel.startswith("matrix")]
    offered = {triton_static.default_tile(case, LIMITS[name]) is not None for case in cases}
    assert offered == {name in ("sm_80", "sm_90")}


@pytest.mark.parametrize("kernel", ["chain", "matrix", "matrix_gradient"])
def test_row_counts_need_few_kernels(kernel: str) -> None:
    problem, limits = triton_static.BALANCED, LIMITS["sm_90"]
    rows = range(1, FEW_ROWS) if kernel == "chain" else range(FEW_ROWS, 8000, 80)
    buckets = {power_of_two(n) for n in rows}
    # Splits are no constant of the kernel of matrices.
    tiles = {TILES[kernel](problem, n, 2, limits)[0][1]._replace(splits=1) for n in buckets}
    assert len(tiles) <= 6


@pytest.mark.parametrize("case", triton_static.CASES, ids=lambda case: case.name)
def test_no_kernel_is_compiled_for_a_row_count(case: triton_static.Case) -> None:
    kernel, given = triton_static.arguments(case)
    counts = {name for name, _ in given} & {
        "rows",
        "tokens",
        "matrices",
        "steps",
        "steps_per_split",
    }
    assert counts <= set(kernel.do_not_specialize)
