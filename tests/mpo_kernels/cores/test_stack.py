"""Matrices of one size with one rank set: against each matrix by itself."""

from __future__ import annotations

import pytest
import torch

from mpo_kernels import MPOShape, decompose
from mpo_kernels.cores.fitting import RIDGE
from mpo_kernels.cores.stack import choose_stack, decompose_stack, reconstruct_stack, stack_spectrum
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


def test_of_one_matrix_it_is_what_is_done_to_one() -> None:
    weight, shape = torch.randn(10, 8), MPOShape.low_rank(8, 10, 3)
    found, right = decompose_stack(weight, shape), decompose(weight, shape)
    assert found.stacked == 1 and found.rel_error == right.rel_error
    assert all(torch.equal(a, b) for a, b in zip(found.cores, right.cores, strict=True))
    assert torch.equal(
        reconstruct_stack(found.cores, shape),
        reconstruct_stack([c[None] for c in right.cores], shape)[0],
    )
