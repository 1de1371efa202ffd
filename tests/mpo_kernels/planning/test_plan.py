"""The planner: its counts against an independent path finder, its choices, its explanation."""

import math
from dataclasses import replace

import opt_einsum
import pytest
import torch

from mpo_kernels import MPOLinear, MPOShape
from mpo_kernels.planning.candidates import plan_library
from mpo_kernels.planning.figures import default_figures
from mpo_kernels.planning.plan import Call, Gradients
from mpo_kernels.planning.work import Work, exposed, time_of

FIGURES = default_figures("cpu", torch.float32, 2)


def plan(shape, rows, gradients=None):
    features = (shape.in_features, shape.out_features)
    call = Call(shape.core_shapes, features, rows, torch.float32, gradients)
    return plan_library(call, FIGURES)


def optimal_macs(shape, rows):
    """Multiply-adds of opt_einsum's optimal pairwise path over x and all cores."""
    n = shape.num_cores
    symbols = [opt_einsum.get_symbol(k) for k in range(3 * n + 2)]
    row, bonds, factors = symbols[0], symbols[1 : n + 2], symbols[n + 2 :]
    ins, outs = factors[:n], factors[n:]
    cores = [bonds[k] + ins[k] + outs[k] + bonds[k + 1] for k in range(n)]
    equation = f"{row}{''.join(ins)},{','.join(cores)}->{row}{''.join(outs)}{bonds[0]}{bonds[-1]}"
    _, info = opt_einsum.contract_path(
        equation, (rows, *shape.in_factors), *shape.core_shapes, shapes=True, optimize="optimal"
    )
    # A product with a sum costs two operations an element, an outer product one.
    return float(info.opt_cost) / 2


SHAPES = {
    "n5": MPOShape.balanced(768, 3072),
    "n5-64": MPOShape.balanced(768, 3072, 5, 64),
    "n3-64": MPOShape.balanced(768, 3072, 3, 64),
    "n2-64": MPOShape.balanced(768, 3072, 2, 64),
    "down": MPOShape.balanced(3072, 768, 3, 64),
    "skewed": MPOShape.skewed(4096, 4096, 16, 256, 64),
    "low-rank": MPOShape.low_rank(4096, 4096, 64),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rows", [1, 16, 4096])
def test_the_fewest_macs_of_a_candidate_are_near_the_optimal_paths(name, rows):
    """The optimal path may form W whole, or contract x from both ends; candidates may not."""
    fewest = min(candidate.macs for candidate in plan(SHAPES[name], rows).candidates)
    assert fewest <= 1.3 * optimal_macs(SHAPES[name], rows)


@pytest.mark.parametrize("order", ["left", "right"])
def test_macs_of_a_two_core_chain_are_the_formulas(order):
    shape = MPOShape((8, 12), (16, 6), 20)
    candidate = next(
        c for c in plan(shape, 64).candidates if (c.algorithm, c.order) == ("chain", order)
    )
    (il, ir), (jl, jr), d = shape.in_factors, shape.out_factors, 20
    a_row = {"left": d * jl * ir * (il + jr), "right": d * il * jr * (ir + jl)}[order]
    assert candidate.macs == 64 * a_row


def test_macs_of_panels_are_dense_plus_the_rebuilding():
    shape = SHAPES["n5"]
    candidate = next(c for c in plan(shape, 4096).candidates if c.split == (2, 3))
    rebuilding = min(453e6 + 906e6, candidate.macs)
    dense = 4096 * 768 * 3072
    assert candidate.macs == pytest.approx(dense + rebuilding, rel=0.01)


def test_few_rows_chain_many_rows_panels_and_low_rank_always_chains():
    assert plan(SHAPES["n2-64"], 1).algorithm == "chain"
    assert plan(SHAPES["n2-64"], 4096).algorithm == "panels"
    assert all(plan(SHAPES["low-rank"], rows).algorithm == "chain" for rows in (1, 16, 256, 4096))


def test_x_and_y_do_not_cut_a_chain_into_blocks_and_blocks_are_alike():
    everything = Gradients(True, (True, True))
    assert plan(SHAPES["low-rank"], 4096).block == 4096
    assert plan(SHAPES["low-rank"], 4096, everything).block == 4096
    for shape in SHAPES.values():
        for candidate in plan(shape, 4096).candidates:
            if candidate.algorithm == "chain":
                blocks = -(-4096 // candidate.block)
                assert candidate.block * blocks - 4096 < blocks


def test_a_frozen_centre_is_never_dearer_and_rows_are_bucketed():
    shape = SHAPES["n5"]
    full = plan(shape, 512, Gradients(True, (True,) * 5))
    light = plan(shape, 512, Gradients(True, (True, True, False, True, True)))
    assert light.macs < full.macs
    assert plan(shape, 300) is plan(shape, 512) and plan(shape, 300).rows == 512


def test_panels_stay_within_half_of_w_and_the_workspace():
    for shape in SHAPES.values():
        ins, outs = math.prod(shape.in_factors), math.prod(shape.out_factors)
        for candidate in plan(shape, 4096).candidates:
            if candidate.algorithm == "panels":
                leading = math.prod(shape.out_factors[: candidate.split[0]])
                panel = candidate.block * ins * outs // leading
                assert panel <= ins * outs // 2
                assert panel * 4 <= FIGURES.panel_bytes or candidate.block == 1


def test_the_explanation_names_the_choice_and_what_lost():
    shape = SHAPES["n3-64"]
    text = str(MPOLinear(768, 3072, shape, device="meta").plan(16))
    assert text.count("<- chosen") == 1
    assert "chain" in text and "panels" in text and "rows ≤ 16" in text
    backward = MPOLinear(768, 3072, shape, device="meta").plan(16, backward=True)
    assert backward.macs > MPOLinear(768, 3072, shape, device="meta").plan(16).macs


def test_operands_are_moved_while_products_multiply():
    figures = replace(FIGURES, bytes_per_second=1e12, macs_per_second=1e12, side=0)
    products = [Work(100, 100, 100, count=3), Work(bytes=10**9)]
    assert exposed(2 * 10**6, products, figures) == 0
    assert exposed(5 * 10**6, products, figures) == pytest.approx(2e-6)


@pytest.mark.parametrize("backward", [False, True])
def test_many_rows_of_panels_take_what_dense_takes_and_forming_them(backward):
    """In the end by as much: x and y are moved by the very products that dense has as well."""
    shape, counts = SHAPES["n5"], (2**16, 2**17)
    figures = replace(default_figures("cuda", torch.bfloat16, 1), host_seconds=0.0)
    needs = Gradients(True, (True, True, False, True, True)) if backward else None
    calls = [Call(shape.core_shapes, (768, 3072), rows, torch.bfloat16, needs) for rows in counts]
    few, many = (plan_library(call, figures, digits=True) for call in calls)
    macs = (1 + backward) * 2**16 * 768 * 3072
    added = 1e-6 * (many.predicted_us - few.predicted_us)
    # Short sides of a panel are all that it has more.
    assert 1 < added * figures.macs_per_second / macs < 1.2


def test_the_host_counts_where_it_is_slower_than_the_device():
    """Half of it: a replayed graph has none of its time, an eager call all of it."""
    work = [Work(bytes=10**6, count=3)]
    figures = replace(FIGURES, bytes_per_second=1e12, launch_seconds=1e-6, host_seconds=12e-6)
    device = 3e-6 + 1e-6
    assert time_of(work, figures) == pytest.approx(math.sqrt(device * 36e-6))
    assert time_of(work, figures, 1e-3) == pytest.approx(device + 1e-3)
    assert time_of([], figures, device, 2) == pytest.approx(math.sqrt(device * 24e-6))
    assert time_of(work, replace(figures, host_seconds=0.0)) == pytest.approx(device)
