"""MPOExperts: against each expert's dense matrix in fp64, by the kernel and by the loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mpo_kernels import MPOShape
from mpo_kernels.cores.stack import decompose_stack, reconstruct_stack
from mpo_kernels.layers.experts import MPOExperts
from mpo_kernels.ops import grouped

SHAPES = {
    "low rank": MPOShape.low_rank(24, 40, 8),
    "odd": MPOShape.low_rank(7, 11, 3),
    "transposed": MPOShape((24, 1), (1, 40), 8),
    "skewed": MPOShape.skewed(21, 10, 2, 5, 9),
    "five": MPOShape.balanced(24, 36, 5),
    "padded": MPOShape((2, 2, 3), (3, 2, 2), 5, in_features=11, out_features=10),
    "one core": MPOShape((6,), (8,)),
}
# One without rows at either end and between, one with a single row.
COUNTS = (0, 5, 0, 1, 3, 0)


def _offsets(counts: tuple[int, ...]) -> Tensor:
    return torch.tensor(counts).cumsum(0).int()


def _layer(shape: MPOShape, dtype: torch.dtype = torch.float64) -> MPOExperts:
    torch.manual_seed(0)
    return MPOExperts(len(COUNTS), shape, dtype=dtype)


def _dense(x: Tensor, layer: MPOExperts, counts: tuple[int, ...] = COUNTS) -> Tensor:
    """By einsum of each expert's cores, which autograd differentiates."""
    shape, rows = layer.shape, []
    for e, part in enumerate(x.split(counts)):
        whole = layer.cores[0][e]
        for core in list(layer.cores)[1:]:
            whole = torch.einsum("aijb,bklc->aikjlc", whole, core[e]).flatten(3, 4).flatten(1, 2)
        rows.append(part @ whole[0, : shape.in_features, : shape.out_features, 0])
    return torch.cat(rows)


@pytest.mark.parametrize("counts", [COUNTS, (0, 0, 0, 0, 0, 1), (0, 0, 0, 0, 0, 0)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_the_dense_matrix_of_each_expert(shape: MPOShape, counts: tuple[int, ...]) -> None:
    layer = _layer(shape)
    x = torch.randn(sum(counts), shape.in_features, dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.cores]
    found, right = layer(x, _offsets(counts)), _dense(x, layer, counts)
    torch.testing.assert_close(found, right)
    flow = torch.randn_like(right)
    grads = zip(*(torch.autograd.grad(y, wanted, flow) for y in (found, right)), strict=True)
    for grad, expected in grads:
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("rows", [1, 1000])
def test_few_rows_and_many_merge_otherwise_and_agree(rows: int) -> None:
    shape = SHAPES["five"]
    plans = {grouped._plan(shape.core_shapes, 6, n)[0] for n in (1, 1024)}
    assert len(plans) == 2
    layer, counts = _layer(shape), (0, 0, rows, 0, 0, 0)
    x = torch.randn(rows, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x, _offsets(counts)), _dense(x, layer, counts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_the_loop(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, calls = _layer(SHAPES["low rank"], dtype), []
    x = torch.randn(9, 24, dtype=dtype, requires_grad=True)
    kernel = torch.nn.functional.grouped_mm

    def counted(*args: Tensor, **options: Tensor) -> Tensor:
        calls.append(1)
        return kernel(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", counted)
    found = []
    for is_there in (True, False):
        if not is_there:
            monkeypatch.setattr(grouped, "_has_kernel", lambda *operands: False)
        y = layer(x, _offsets(COUNTS))
        found.append((y, *torch.autograd.grad(y.sum(), [x, *layer.cores])))
    assert len(calls) == (6 if torch.__version__ >= (2, 11) else 0)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_computes_in_its_dtype() -> None:
    layer = _layer(SHAPES["odd"], torch.float32)
    x = torch.randn(9, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x, _offsets(COUNTS))
    assert found.dtype == torch.bfloat16
    right = layer.bfloat16()(x.bfloat16(), _offsets(COUNTS))
    torch.testing.assert_close(found, right)


def test_bad_input() -> None:
    layer, x = _layer(SHAPES["odd"]), torch.randn(9, 7, dtype=torch.float64)
    offsets = _offsets(COUNTS)
    for bad, ends, error, line in (
        (x[:, :6], offsets, ValueError, r"expected x \[..., 7\], got \[9, 6\]"),
        (x[None], offsets, ValueError, r"expected rows \[rows, 7\], got \[1, 9, 7\]"),
        (x.float(), offsets, TypeError, "expected cores like x, torch.float32"),
        (x, offsets.long(), ValueError, r"expected int32 offsets \[6\], got torch.int64 \[6\]"),
        (x, offsets[:5], ValueError, r"expected int32 offsets \[6\], got torch.int32 \[5\]"),
    ):
        with pytest.raises(error, match=line):
            layer(bad, ends)
    with pytest.raises(ValueError, match="expected at least one expert, got 0"):
        MPOExperts(0, SHAPES["odd"])


def test_its_parts_in_a_model() -> None:
    layer = _layer(SHAPES["five"])
    weight = layer.to_weight()
    assert weight.shape == layer.weight.shape == (6, 36, 24)
    layer.balance()
    torch.testing.assert_close(layer.to_weight(), weight)
    layer.freeze_central()
    trained = [core.requires_grad for core in layer.cores]
    assert trained == [k != layer.central for k in range(5)]
    with pytest.raises(NotImplementedError, match=r"MPOExperts \[6, 36, 24\]: held as cores"):
        layer.weight.float()


def test_a_state_of_other_ranks_is_loaded_and_of_other_experts_refused() -> None:
    layer, small = _layer(SHAPES["low rank"]), _layer(MPOShape.low_rank(24, 40, 3))
    small.load_state_dict(layer.state_dict())
    assert small.shape == layer.shape and torch.equal(small.cores[0], layer.cores[0])
    with pytest.raises(RuntimeError, match="expected cores of 5 experts"):
        MPOExperts(5, layer.shape, dtype=torch.float64).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_decomposed_at_full_rank_nothing_is_lost(shape: MPOShape) -> None:
    weights = torch.randn(3, shape.out_features, shape.in_features, dtype=torch.float64)
    found = decompose_stack(weights, shape.with_ranks(None))
    layer = MPOExperts.from_decomposition(found)
    torch.testing.assert_close(layer.to_weight(), weights)
    assert found.rel_error < 1e-12


@pytest.mark.parametrize("cores", [2, 3])
def test_bounds_hold_for_all_experts_with_one_rank_set(cores: int) -> None:
    torch.manual_seed(0)
    scales = torch.tensor([1.0, 0.1, 3.0, 0.0])[:, None, None]  # and one that is zero
    weights = (scales * torch.randn(4, 16, 12)).double()
    weights[1] = weights[1, :, :2] @ torch.randn(2, 12, dtype=torch.float64)  # of rank two
    shape = MPOShape.balanced(12, 16, cores)
    for bounds in ({"compression": 0.5}, {"rel_error": 0.4}):
        found = decompose_stack(weights, shape, **bounds)
        each = reconstruct_stack(found.cores, found.shape)
        errors = [torch.linalg.norm(a - b) for a, b in zip(each, weights, strict=True)]
        total = torch.stack(errors).norm() / weights.norm()
        assert found.rel_error == pytest.approx(float(total))
        if "compression" in bounds:
            assert found.shape.compression <= 0.5
        else:
            bound = 0.4 * torch.linalg.vector_norm(weights, dim=(1, 2))
            assert (torch.stack(errors) <= bound + 1e-9).all()


def test_each_expert_is_fitted_to_its_own_inputs() -> None:
    torch.manual_seed(0)
    weights = torch.randn(3, 10, 8, dtype=torch.float64)
    inputs = torch.randn(3, 20, 8, dtype=torch.float64) * torch.logspace(0, -2, 8).double()
    inputs[1] = inputs[1].flip(1)
    moments = inputs.mT @ inputs
    shape = MPOShape.low_rank(8, 10, 3)
    errors = []
    for options in ({}, {"second_moments": moments}, {"second_moments": moments[[0, 0, 0]]}):
        found = decompose_stack(weights, shape, **options, judges=moments)
        right = torch.einsum("eri,eoi->ero", inputs, weights)
        layer = MPOExperts.from_decomposition(found)
        offsets = torch.tensor([20, 40, 60], dtype=torch.int32)
        y = layer(inputs.flatten(0, 1), offsets).view_as(right)
        assert found.output_error == pytest.approx(
            float((y.detach() - right).norm() / right.norm())
        )
        errors.append(found.output_error)
    assert errors[1] < 0.5 * errors[0] and errors[1] < 0.5 * errors[2]


def test_what_is_wrong_with_one_expert_is_said_with_its_number() -> None:
    weights = torch.randn(3, 10, 8)
    weights[2, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^2: expected a finite weight"):
        decompose_stack(weights, MPOShape.low_rank(8, 10, 3))
