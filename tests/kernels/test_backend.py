"""The back end as a whole: every plan it may choose, autograd, autocast, refusals."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

import mpo_kernels as mk
from mpo_kernels import MPOShape
from mpo_kernels.backends.triton.backend import TritonBackend
from mpo_kernels.planning.plan import Gradients, Plan
from mpo_kernels.testing import ODD_SHAPES, dense_linear, random_cores, relative_error


@pytest.fixture(autouse=True)
def triton_backend(device: torch.device) -> Iterator[None]:
    """All of it on the device, by the back end under test."""
    torch.set_default_device(device)
    with mk.use_backend("triton"):
        yield
    torch.set_default_device(None)


def problem(shape: MPOShape, rows: int, dtype: torch.dtype = torch.float32) -> tuple:
    cores = random_cores(shape, dtype, torch.get_default_device())
    x = torch.randn(rows, shape.in_features).to(dtype)
    return x, cores, torch.randn(shape.out_features).to(dtype)


def bound(dtype: torch.dtype, fp32: float) -> float:
    """Of a result whose intermediates are rounded to the dtype, up to five times in a row."""
    return fp32 if dtype == torch.float32 else 5 * torch.finfo(dtype).eps


def tried(plan: Plan, dtype: torch.dtype) -> list[Plan]:
    """The candidates; in 16 bits without chains and panels, which other tests have in all cases."""
    fused = [p for p in plan.candidates if p.algorithm == "fused" and dtype != torch.float32]
    return fused or list(plan.candidates)


CASES = [(1, torch.float32), (5, torch.float32), (33, torch.float32), (70, torch.float16)]


@pytest.mark.parametrize("rows, dtype", CASES)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_every_forward_plan_agrees_with_dense(
    shape: MPOShape, rows: int, dtype: torch.dtype
) -> None:
    x, cores, bias = problem(shape, rows, dtype)
    exact = dense_linear(x.double(), [c.double() for c in cores], bias.double(), shape)
    features = (shape.in_features, shape.out_features)
    plan = TritonBackend().plan_for(rows, x.dtype, x.device, cores, features=features)
    for candidate in tried(plan, dtype):
        y = TritonBackend().linear(x, cores, bias, shape.out_features, candidate)
        assert relative_error(y, exact) < bound(dtype, 2e-6), candidate.algorithm


@pytest.mark.parametrize("rows, dtype", CASES[1:])
@pytest.mark.parametrize("light", [False, True])
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_every_backward_plan_agrees_with_dense(
    shape: MPOShape, light: bool, rows: int, dtype: torch.dtype
) -> None:
    x, cores, bias = problem(shape, rows, dtype)
    dy = torch.randn(rows, shape.out_features).to(dtype)
    exact = [t.double().requires_grad_() for t in (x, *cores)]
    y = dense_linear(exact[0], exact[1:], bias.double(), shape)
    of_x, *of_cores = torch.autograd.grad(y, exact, dy.double())
    needs = tuple(not light or k != shape.central for k in range(len(cores)))
    gradients = Gradients(True, needs)
    features = (shape.in_features, shape.out_features)
    plan = TritonBackend().plan_for(rows, x.dtype, x.device, cores, gradients, features)
    for candidate in tried(plan, dtype):
        dx, found = TritonBackend().linear_backward(dy, x, cores, gradients, candidate)
        assert relative_error(dx, of_x) < bound(dtype, 3e-6), candidate
        for need, got, core, expected in zip(needs, found, cores, of_cores, strict=True):
            assert (got is not None) == need
            if need:
                assert got.shape == core.shape and got.dtype == core.dtype
                assert relative_error(got, expected) < bound(dtype, 3e-6), candidate


def test_which_kernels_form_what() -> None:
    cores = random_cores(MPOShape((6, 7), (5, 8), 4), device=torch.get_default_device())

    def tiles(rows: int, dtype: torch.dtype, gradients: Gradients | None) -> list[str]:
        plan = TritonBackend().plan_for(rows, dtype, cores[0].device, cores, gradients)
        kinds = {candidate.algorithm for candidate in plan.candidates}
        assert {"panels", "chain"} <= kinds
        fused = [p for p in plan.candidates if p.algorithm == "fused"]
        return [type(launch.tile).__name__ for p in fused for launch in p.launches]

    half, whole = torch.float16, torch.float32
    every, none = Gradients(True, (True, True)), Gradients(True, (False, False))
    assert tiles(7, half, None) in (["ChainTile"], ["MatrixTile"])
    assert tiles(7, whole, None) == ["ChainTile"]
    assert tiles(100, half, None) == tiles(100, half, none) == ["MatrixTile"]
    assert tiles(7, half, every)[1:] == ["MatrixTile"] * 2
    assert tiles(100, half, every) == ["MatrixTile"] * 3
    assert tiles(7, whole, none) == ["ChainTile"]
    # fp32 has the library's ways alone where a part is trained or rows are many.
    assert tiles(100, whole, None) == tiles(7, whole, every) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layer_in_half_precision_trains(dtype: torch.dtype) -> None:
    shape = MPOShape((5, 8), (6, 7), 4)
    layer = mk.MPOLinear(40, 42, shape, dtype=dtype)
    x = torch.randn(3, 4, 40, dtype=dtype, requires_grad=True)
    exact = mk.MPOLinear(40, 42, shape, dtype=torch.float64)
    exact.load_state_dict({k: v.double() for k, v in layer.state_dict().items()})
    x64 = x.detach().double().requires_grad_()
    dy = torch.randn(3, 4, 42, dtype=dtype)
    layer(x).backward(dy)
    with mk.use_backend("torch"):
        exact(x64).backward(dy.double())
    bound = 4 * torch.finfo(dtype).eps
    assert relative_error(x.grad, x64.grad) < bound
    for got, expected in zip(layer.parameters(), exact.parameters(), strict=True):
        assert got.grad.dtype == dtype
        assert relative_error(got.grad, expected.grad) < bound


def test_autocast_computes_in_its_dtype() -> None:
    layer = mk.MPOLinear(40, 42, MPOShape((5, 8), (6, 7), 4))
    x = torch.randn(9, 40)
    with torch.autocast(x.device.type, torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("size", [(0, 40), (3, 0, 40)])
def test_no_rows(size: tuple[int, ...]) -> None:
    layer = mk.MPOLinear(40, 42, MPOShape((5, 8), (6, 7), 4))
    y = layer(torch.randn(size))
    y.sum().backward()
    assert y.shape == (*size[:-1], 42)
    assert all(not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("shape", [s for s in ODD_SHAPES if s.num_cores > 1], ids=str)
def test_embedding_and_its_gradients(shape: MPOShape) -> None:
    layer = mk.MPOEmbedding(shape.in_features, shape.out_features, shape)
    exact = mk.MPOEmbedding(shape.in_features, shape.out_features, shape, dtype=torch.float64)
    exact.load_state_dict({k: v.double() for k, v in layer.state_dict().items()})
    ids = torch.randint(shape.in_features, (4, 9))
    dy = torch.randn(4, 9, shape.out_features)
    rows = layer(ids)
    rows.backward(dy)
    with mk.use_backend("torch"):
        expected = exact(ids)
        expected.backward(dy.double())
    assert relative_error(rows, expected) < 2e-6
    for got, reference in zip(layer.parameters(), exact.parameters(), strict=True):
        assert relative_error(got.grad, reference.grad) < 3e-6


def test_gradients_do_not_change_from_run_to_run() -> None:
    x, cores, _ = problem(MPOShape((6, 7), (5, 8), 4), 70, torch.float16)
    dy = torch.randn(70, 40).to(torch.float16)
    gradients = Gradients(True, (True, True))
    plan = TritonBackend().plan_for(70, x.dtype, x.device, cores, gradients, (42, 40))
    fused = next(p for p in plan.candidates if p.algorithm == "fused")
    assert max(launch.tile.splits for launch in fused.launches) > 1
    one, two = (
        TritonBackend().linear_backward(dy, x, cores, gradients, fused)[1] for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_fp64_is_refused_by_name_and_left_to_torch_otherwise(
    caplog: pytest.LogCaptureFixture,
) -> None:
    layer = mk.MPOLinear(6, 6, MPOShape((2, 3), (2, 3)), dtype=torch.float64)
    x = torch.randn(2, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"triton back end cannot compute this.*float64"):
        layer(x)
    with mk.use_backend("auto"), caplog.at_level(logging.WARNING):
        assert relative_error(layer(x), layer.to_linear()(x)) < 1e-14


@pytest.mark.parametrize("stride", [2, 0])
def test_bias_and_ids_of_any_stride(stride: int) -> None:
    shape = MPOShape((3, 5), (4, 2), 3)
    x, cores, _ = problem(shape, 7)
    bias = torch.randn(16).as_strided((8,), (stride,))
    exact = dense_linear(x.double(), [c.double() for c in cores], bias.double(), shape)
    assert TritonBackend().plan_for(7, x.dtype, x.device, cores).algorithm == "fused"
    assert relative_error(mk.mpo_linear(x, cores, bias), exact) < 2e-6
    ids = torch.randint(15, (40,)).as_strided((20,), (stride,))
    rows = mk.mpo_embedding(ids, [c.requires_grad_() for c in cores])
    table = mk.reconstruct([c.detach() for c in cores]).t()
    assert relative_error(rows, table[ids]) < 2e-6
    dy = torch.randn(20, 8)
    exact_cores = [c.detach().double().requires_grad_() for c in cores]
    with mk.use_backend("torch"):
        expected = mk.mpo_embedding(ids, exact_cores)
        of_cores = torch.autograd.grad(expected, exact_cores, dy.double())
    for got, reference in zip(torch.autograd.grad(rows, cores, dy), of_cores, strict=True):
        assert relative_error(got, reference) < 3e-6


def test_the_plan_of_a_padded_layer_can_be_run() -> None:
    shape = MPOShape((5, 8), (6, 7), 4, in_features=37, out_features=40)
    layer = mk.MPOLinear(37, 40, shape)
    x = torch.randn(9, 37)
    y = TritonBackend().linear(x, list(layer.cores), layer.bias, 40, layer.plan(9))
    assert torch.equal(y, layer(x))


def test_an_id_out_of_range_reads_nothing() -> None:
    cores = random_cores(MPOShape((3, 5), (4, 2), 3), device=torch.get_default_device())
    ids = torch.tensor([3, 15, -1, 10**6])
    rows = TritonBackend().embedding(ids, cores, 8)
    assert rows[0].any() and not rows[1:].any()
    needs = (True, True)
    all_ids = TritonBackend().embedding_backward(torch.ones(4, 8), ids, cores, needs)
    first = TritonBackend().embedding_backward(torch.ones(1, 8), ids[:1], cores, needs)
    for got, expected in zip(all_ids, first, strict=True):
        torch.testing.assert_close(got, expected)
