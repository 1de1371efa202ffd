"""Matrices of one size with one rank set: against each matrix by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mpo_kernels import MPOShape, decompose
from mpo_kernels.cores import stack
from mpo_kernels.cores.fitting import RIDGE
from mpo_kernels.cores.stack import (
    choose_stack,
    decompose_stack,
    reconstruct_stack,
    sharings,
    stack_spectrum,
)
from mpo_kernels.layers.cost import LayerCost

SHAPES = [
    MPOShape.low_rank(24, 40, 8),
    MPOShape.low_rank(7, 11, 3),
    MPOShape((2, 2, 3), (3, 2, 2), 5, in_features=11, out_features=10),
    MPOShape((6,), (8,)),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_decomposed_at_full_rank_nothing_is_lost(shape: MPOShape) -> None:
    weights = torch.randn(3, shape.out_features, shape.in_features, dtype=torch.float64)
    found = decompose_stack(weights, shape.with_ranks(None))
    torch.testing.assert_close(reconstruct_stack(found.cores, shape), weights)
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
        y = torch.einsum("eri,eoi->ero", inputs, reconstruct_stack(found.cores, shape))
        assert found.output_error == pytest.approx(float((y - right).norm() / right.norm()))
        errors.append(found.output_error)
    assert errors[1] < 0.5 * errors[0] and errors[1] < 0.5 * errors[2]


def test_what_is_wrong_with_one_expert_is_said_with_its_number() -> None:
    weights = torch.randn(3, 10, 8)
    weights[2, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^2: expected a finite weight"):
        decompose_stack(weights, MPOShape.low_rank(8, 10, 3))


def test_the_spectrum_says_what_low_rank_loses() -> None:
    torch.manual_seed(0)
    weights = torch.randn(3, 9, 8, dtype=torch.float64)
    inputs = (
        torch.randn(3, 20, 8, dtype=torch.float64) * torch.tensor([1.0, 0.1, 5.0])[:, None, None]
    )
    moments = inputs.mT @ inputs
    spectrum = stack_spectrum(weights, moments)
    # Its own directions that no input took are held by a little of the identity.
    ridge = RIDGE * moments.diagonal(dim1=1, dim2=2).mean(1)
    held = moments + ridge[:, None, None] * torch.eye(8, dtype=torch.float64)
    for rank in (1, 3, 8):
        found = decompose_stack(weights, MPOShape.low_rank(8, 9, rank), second_moments=moments)
        lost = weights - reconstruct_stack(found.cores, found.shape)
        square = torch.einsum("eoi,eij,eoj->", lost, held, lost)
        assert float(spectrum[rank:].square().sum()) == pytest.approx(float(square), abs=1e-8)


def test_within_a_budget() -> None:
    weights = torch.randn(3, 10, 8, dtype=torch.float64)
    found = choose_stack(weights, 3 * 18 * 2 + 17, LayerCost())
    assert found.shape == MPOShape.low_rank(8, 10, 2) and found.stacked == 3


def _alike(side: str) -> Tensor:
    """Experts whose outputs, or what they mind of the inputs, lie in three directions."""
    few, many = torch.randn(4, 10, 3).double(), torch.randn(4, 3, 8).double()
    return few[:1] @ many if side == "outputs" else few @ many[:1]


@pytest.mark.parametrize(("side", "index"), [("outputs", 0), ("inputs", 1)])
@pytest.mark.parametrize("dim", [None, 1, 2])
def test_a_common_core_is_that_which_loses_less(side: str, index: int, dim: int | None) -> None:
    torch.manual_seed(0)
    weights, inputs = _alike(side), torch.randn(4, 20, 8, dtype=torch.float64)
    moments = None if dim is None else inputs.mT @ inputs
    if dim == 1:
        moments = moments.diagonal(dim1=1, dim2=2)
    found = choose_stack(weights, 4 * 54, LayerCost(), moments, shared_core=True)
    assert (found.shared, found.stacked) == (index, 4) and found.rel_error < 1e-6
    assert sum(core.numel() for core in found.cores) <= 4 * 54
    torch.testing.assert_close(reconstruct_stack(found.cores, found.shape), weights)


@pytest.mark.parametrize("index", [0, 1])
def test_what_a_common_core_loses_at_each_rank(index: int) -> None:
    torch.manual_seed(0)
    weights, inputs = (
        torch.randn(2, 3, 9, 8, dtype=torch.float64).unbind()[0],
        torch.randn(3, 50, 8),
    )
    alike = inputs[:1].expand(3, 50, 8).double()
    for moments in (None, alike.mT @ alike):
        common = sharings(weights, moments)[index]
        held = torch.eye(8, dtype=torch.float64).expand(3, 8, 8)
        if moments is not None:
            held = moments + RIDGE * moments.diagonal(dim1=1, dim2=2).mean() * held
        # Of outputs the joint matrix has the inputs of all in a row, of inputs their outputs.
        roots = torch.linalg.cholesky(held)
        seen = weights @ roots
        joint = torch.cat(list(seen), dim=1 - index)
        spectrum = torch.linalg.svdvals(joint)
        for rank in (1, 3, 8):
            lost = weights - reconstruct_stack(common.cores(rank), MPOShape.low_rank(8, 9, rank))
            square = float(torch.einsum("eoi,eij,eoj->", lost, held, lost))
            right = pytest.approx(float(spectrum[rank:].square().sum()), abs=1e-8)
            assert square == right and float(common.lost[rank]) == right


def test_the_common_core_of_inputs_is_fitted_to_what_each_is_fed() -> None:
    torch.manual_seed(0)
    weights = torch.randn(3, 10, 8, dtype=torch.float64)
    inputs = torch.randn(3, 20, 8, dtype=torch.float64) * torch.logspace(0, -2, 8).double()
    inputs[1] = inputs[1].flip(1)
    moments, errors = inputs.mT @ inputs, []
    for given in (None, moments[[0, 0, 0]], moments):
        cores = sharings(weights, given)[1].cores(4)
        lost = weights - reconstruct_stack(cores, MPOShape.low_rank(8, 10, 4))
        errors.append(float(torch.einsum("eri,eoi->ero", inputs, lost).norm()))
    assert errors[2] < 0.5 * errors[0] and errors[2] < 0.5 * errors[1]


def test_a_side_that_is_too_wide_is_not_common(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.randn(3, 10, 8)
    assert [common._index for common in sharings(weights, None)] == [0, 1]
    monkeypatch.setattr(stack, "_WIDEST", 9)
    assert [common._index for common in sharings(weights, None)] == [1]
    assert [common._index for common in sharings(weights.mT, None)] == [0]
    monkeypatch.setattr(stack, "_WIDEST", 4)
    assert [common._index for common in sharings(weights, None)] == [1]


def test_a_budget_below_one_rank_of_a_common_core() -> None:
    with pytest.raises(ValueError, match="expected a budget that one rank meets, got 3"):
        choose_stack(torch.randn(3, 10, 8), 3, LayerCost(), shared_core=True)


def test_of_one_matrix_it_is_what_is_done_to_one() -> None:
    weight, shape = torch.randn(10, 8), MPOShape.low_rank(8, 10, 3)
    found, right = decompose_stack(weight, shape), decompose(weight, shape)
    assert found.stacked == 1 and found.rel_error == right.rel_error
    assert all(torch.equal(a, b) for a, b in zip(found.cores, right.cores, strict=True))
    assert torch.equal(
        reconstruct_stack(found.cores, shape),
        reconstruct_stack([c[None] for c in right.cores], shape)[0],
    )
