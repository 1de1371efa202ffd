"""Products of digits, and panels of any number of parts, against fp64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from mpo_kernels import MPOShape
from mpo_kernels.backends.triton import panels
from mpo_kernels.backends.triton.product import Job, Task, product_of, run
from mpo_kernels.backends.triton.tiles import LIMITS, ProductTile
from mpo_kernels.planning.plan import Gradients, Plan
from mpo_kernels.testing import dense_linear, random_cores, relative_error

HALF = (torch.float16, torch.bfloat16)
PRECISE = {torch.float32: 2e-6} | {dtype: 4 * torch.finfo(dtype).eps for dtype in HALF}


def plan_of(split: tuple[int, ...], block: int, order: str = "columns") -> Plan:
    return Plan("panels", order, split, 64, block, 0, 0, 0.0)


@pytest.mark.parametrize("dtype", PRECISE, ids=str)
@pytest.mark.parametrize("splits", [1, 3])
def test_operands_and_result_lie_permuted(
    dtype: torch.dtype, splits: int, device: torch.device
) -> None:
    sizes = {"i": 5, "j": 3, "r": 37, "u": 4, "v": 9}
    a, b = (
        torch.randn([sizes[d] for d in order.split()], device=device).to(dtype)
        for order in ("j i r", "u r v")
    )
    p = product_of("j i r", "u r v", "u i v j", sizes)
    c = a.new_empty((splits, 4, 5, 9, 3), dtype=torch.float32)
    run(Job(Task(p, ProductTile(16, 32, 16, splits, 4, 2)), a, b, c))
    exact = torch.einsum("jir,urv->uivj", a.double(), b.double())
    assert relative_error(c.sum(0), exact) < 2e-6
    if splits > 1:
        return
    before = c[0].clone()
    run(Job(Task(p, ProductTile(32, 16, 32, 1, 4, 2)), a, b, c), add=True)
    assert relative_error(c[0], exact + before.double()) < 2e-6


@pytest.fixture(autouse=True)
def small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiles as large as on a problem that fills one."""
    limits = replace(LIMITS["sm_90"], multiprocessors=3)
    monkeypatch.setattr(panels, "limits", lambda _: limits)


@dataclass(frozen=True)
class Case:
    shape: MPOShape
    split: tuple[int, ...]
    block: int
    order: str
    frozen: tuple[int, ...] = ()
    padding: tuple[int, int] = (0, 0)


FIVE = MPOShape((3, 2, 3, 2, 3), (2, 3, 2, 3, 2), (5, 7, 9, 4))
FOUR = MPOShape((3, 2, 5, 2), (2, 3, 4, 3), (5, 7, 6))
THREE = MPOShape((3, 2, 5), (2, 3, 4), (5, 7))
TWO = MPOShape((7, 9), (5, 11), 6)
SMALL = MPOShape((2, 3, 1, 3), (3, 2, 2, 2), (4, 6, 5))
CASES = [
    Case(FIVE, (2, 3), 4, "columns", frozen=(2,)),
    Case(FIVE, (2, 3), 4, "columns", padding=(3, 5)),
    Case(FIVE, (2, 3), 4, "rows", frozen=(1, 2), padding=(19, 5)),
    Case(FIVE, (3,), 5, "rows"),
    Case(SMALL, (1,), 2, "columns"),
    Case(FOUR, (1, 2, 3), 1, "columns", frozen=(1,), padding=(3, 3)),
    Case(FOUR, (1, 2, 3), 2, "rows", padding=(25, 1)),
    Case(THREE, (2,), 3, "rows", frozen=(0, 2)),
    Case(THREE, (1,), 1, "columns", frozen=(0, 1)),
    Case(TWO, (1,), 2, "columns", padding=(3, 13)),
    Case(TWO, (1,), 3, "rows", frozen=(0,), padding=(12, 2)),
    Case(TWO, (1,), 3, "rows", frozen=(0, 1)),
    # The last panel has half as many programs, and k would be shared out twice as far.
    Case(MPOShape((20, 9), (10, 11), 6), (1,), 7, "columns"),
]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in CASES),
        *((CASES[k], dtype) for k, dtype in ((1, torch.float16), (2, torch.bfloat16))),
    ],
    ids=str,
)
def test_panels(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    shape, n = case.shape, case.shape.num_cores
    ins, outs = shape.in_features - case.padding[0], shape.out_features - case.padding[1]
    cores = random_cores(shape, dtype, device)
    rows = 13
    x, dy = (torch.randn(rows, 2 * size, device=device).to(dtype)[:, :size] for size in (ins, outs))
    bias = torch.randn(2 * outs, device=device).to(dtype)[::2]
    exact = [t.detach().double().requires_grad_() for t in (x, *cores)]
    rows_of_w = torch.eye(shape.in_features, dtype=torch.float64, device=device)
    y = exact[0] @ dense_linear(rows_of_w, exact[1:], None, shape)[:ins, :outs]
    of_x, *of_cores = torch.autograd.grad(y, exact, dy.double())
    plan = plan_of(case.split, case.block, case.order)
    if case.order == "columns":
        for added in (bias, None):
            got = x.new_empty(rows, outs)
            panels.forward(x, cores, added, got, plan)
            expected = y if added is None else y + added.double()
            assert relative_error(got, expected) < PRECISE[dtype]
    needs = tuple(k not in case.frozen for k in range(n))
    dx, found = panels.backward(dy, x, cores, Gradients(True, needs), plan)
    assert dx is not None and relative_error(dx, of_x) < PRECISE[dtype]
    for need, got, core, expected in zip(needs, found, cores, of_cores, strict=True):
        assert (got is not None) == need
        if got is not None:
            assert got.shape == core.shape and got.dtype == dtype
            assert relative_error(got, expected) < PRECISE[dtype]
    assert panels.backward(dy, x, cores, Gradients(False, needs), plan)[0] is None
